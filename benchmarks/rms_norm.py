"""How fast is RMSNorm over rows, with and without a residual, beside the strongest peers?

python benchmarks/rms_norm.py [options of `effkern bench rms_norm`]
"""

from common import run

if __name__ == "__main__":
    run("rms_norm")
