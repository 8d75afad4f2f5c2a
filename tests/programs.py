"""Programs that solve a small problem, and the limits of their sandbox, for tests of the sandbox."""

import json

import psutil

from mmopd.task.sandbox import Limits

QUICK = Limits(cpu=1, wall=1.5)
SQUARE = json.dumps({"inputs": ["3\n", "12"], "outputs": ["9\n", "144"]})


def answer_of(program: str) -> str:
    return f"So:\n```python\n{program}\n```\n"


def processes() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


HONEST = {
    "input": "print(int(input()) ** 2)",
    "main": "def main():\n    print(int(input()) ** 2)\n\nif __name__ == '__main__':\n    main()",
    "stdin": "import sys\nn = int(sys.stdin.readline())\nsys.stdout.write(f'{n * n}\\n')",
    "bytes": "import os\nn = int(open(0, 'rb').read())\nos.write(1, str(n * n).encode())",
    "own stdout": "import sys, io\nn = int(sys.stdin.buffer.read())\n"
    "sys.stdout = io.TextIOWrapper(open(1, 'wb', closefd=False))\nprint(n * n)",
    "left open": "out = open(1, 'w')\nn = int(input())\nout.write(str(n * n))",
    "exit": "n = int(input())\nprint(n * n)\nexit()",
    "at exit": "import atexit\nn = int(input())\natexit.register(print, n * n)",
    "deep": "import sys, threading\nsys.setrecursionlimit(1 << 20)\nthreading.stack_size(1 << 27)\n"
    "def f(n, k):\n    return n * n if k == 0 else f(n, k - 1)\n"
    "def main():\n    print(f(int(input()), 100000))\n"
    "thread = threading.Thread(target=main)\nthread.start()\nthread.join()",
    "thread at the end": "import threading, time\n"
    "def main():\n    n = int(input())\n    time.sleep(0.1)\n    print(n * n)\n"
    "threading.Thread(target=main).start()",
    "files": "n = int(input())\nopen('x', 'w').write(str(n))\nprint(int(open('x').read()) ** 2)",
    "library": "import asyncio.locks, bisect, collections, ctypes, dataclasses, decimal, fractions, hashlib\n"
    "import heapq, json, re\nimport sqlite3, typing, zoneinfo, unittest, concurrent.futures\nprint(int(input()) ** 2)",
    "data class": "from dataclasses import dataclass\n@dataclass\nclass N:\n    n: int\n"
    "n = N(int(input()))\nprint(n.n ** 2)",
}
