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
    "fast output": "import os, sys\nfrom io import BytesIO, IOBase\n"
    "class Out(IOBase):\n    def __init__(self):\n        self.bytes = BytesIO()\n"
    "    def write(self, text):\n        self.bytes.write(text.encode())\n"
    "    def flush(self):\n        os.write(1, self.bytes.getvalue())\n        self.bytes = BytesIO()\n"
    "sys.stdout = Out()\nn = int(input())\nprint(n * n)",
    "asyncio": "import asyncio\nasync def main():\n    n = int(input())\n"
    "    print(await asyncio.to_thread(lambda: n * n))\nasyncio.run(main())",
    "devices": "n = int(open('/dev/stdin').read())\nopen('/dev/stdout', 'w').write(str(n * n))",
    "judges' names": "def f(n: Optional[int]) -> List[int]:\n    return [pow(n, 2)]\nprint(*f(int(stdin.readline())))",
    "own file": "import os\nprint(os.path.basename(__file__) and int(input()) ** 2)",
    "many digits": "n = int(input())\nassert len(str(10 ** 5000)) == 5001\nprint(n * n)",
    "recursion": "def f(n, k):\n    return n * n if k == 0 else f(n, k - 1)\nprint(f(int(input()), 20000))",
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
