"""How fast is one AdamW step over many tensors, beside the strongest peers?

python benchmarks/adam.py [options of `effkern bench adam`]
"""

from common import run

if __name__ == "__main__":
    run("adam")
