"""From a global program to one rank's: the interpreter, the table of rules, and what an op becomes
on shards when one string of the table cannot say it, one file for each family of ops."""
