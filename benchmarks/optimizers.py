"""How fast is one step of each optimizer over many tensors, beside torch's and the limit?

python benchmarks/optimizers.py [options of `effkern bench optimizers`]
"""

from common import run

if __name__ == "__main__":
    run("optimizers")
