"""Milliseconds forward and backward of kernels, as ``python -m mosaic calibrate`` measured them.

(bits of a number, head dim, rows, keys, heads of all batches, band): the times of each kernel. With
torch 2.11 and flash-attn-4 4.0.0b36. (The H100's are of ``tests/gpu/check_table.py``.)
"""

Times = dict[tuple[int, int, int, int, int, str], dict[str, tuple[float, float]]]

H200: Times = {}
H100: Times = {
    (16, 24, 11, 11, 200000, ""): {
        "flash_attn 4": (5.05, 9.31),
        "cudnn": (3.34, 5.27),
        "flash": (3.58, 11.92),
        "efficient": (2.11, 4.65),
        "math": (2.31, 4.82),
    },
    (16, 24, 32, 32, 68748, ""): {
        "flash_attn 4": (2.29, 3.53),
        "cudnn": (1.19, 2.2),
        "flash": (1.31, 4.59),
        "efficient": (0.86, 2.02),
        "math": (3.11, 4.45),
    },
    (16, 24, 64, 64, 34372, ""): {
        "flash_attn 4": (1.26, 1.93),
        "cudnn": (0.7, 1.61),
        "flash": (0.83, 2.8),
        "efficient": (0.51, 1.34),
        "math": (4.31, 6.2),
    },
    (16, 24, 128, 128, 17184, ""): {
        "flash_attn 4": (0.8, 1.35),
        "cudnn": (0.38, 1.3),
        "flash": (0.51, 1.88),
        "efficient": (0.81, 1.84),
        "math": (6.68, 9.78),
    },
    (16, 24, 256, 256, 8592, ""): {
        "flash_attn 4": (1.0, 1.54),
        "cudnn": (0.55, 1.69),
        "flash": (0.66, 2.27),
        "efficient": (1.34, 3.93),
    },
    (16, 24, 512, 512, 4296, ""): {
        "flash_attn 4": (1.03, 1.95),
        "cudnn": (0.83, 2.39),
        "flash": (1.08, 3.21),
        "efficient": (2.38, 7.02),
    },
    (32, 24, 11, 11, 200000, ""): {
        "efficient": (5.54, 10.27),
        "math": (1.78, 3.77),
    },
    (32, 24, 32, 32, 68748, ""): {
        "efficient": (1.98, 4.2),
        "math": (2.54, 3.45),
    },
    (32, 24, 64, 64, 34372, ""): {
        "efficient": (1.24, 2.8),
        "math": (3.68, 5.1),
    },
    (32, 24, 128, 128, 17184, ""): {
        "efficient": (2.17, 4.68),
        "math": (6.13, 8.79),
    },
    (32, 24, 256, 256, 8592, ""): {
        "efficient": (4.17, 10.3),
    },
    (32, 24, 512, 512, 4296, ""): {
        "efficient": (7.41, 18.04),
    },
}
