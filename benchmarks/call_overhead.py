"""What does a call cost on an input so small that nothing else counts?

python benchmarks/call_overhead.py [cpu | cuda]
"""

import sys

from common import RESULTS, console

from effkern.bench import call_overhead, plots, tables

if __name__ == "__main__":
    result = call_overhead.run(sys.argv[1] if len(sys.argv) > 1 else "cpu")
    console().print(tables.render(result))
    result.write(RESULTS / "call_overhead.json")
    plots.draw(result, RESULTS / "call_overhead.png")
