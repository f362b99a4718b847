"""How fast are NormSoftmax and its cross-entropy, and what memory do they take, beside others?

python benchmarks/norm_softmax.py [options of `effkern bench norm_softmax`]
"""

from common import run

if __name__ == "__main__":
    run("norm_softmax")
