"""Programs that solve a small problem, and the limits of their sandbox, for tests of the sandbox."""

import contextlib
import json
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import mmopd
from mmopd.task.sandbox import Limits, Sandbox

QUICK = Limits(cpu=1, wall=1.5)
SQUARE = json.dumps({"inputs": ["3\n", "12"], "outputs": ["9\n", "144"]})


def answer_of(program: str) -> str:
    return f"So:\n```python\n{program}\n```\n"


def processes() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


USER = {"user": 1000, "group": 1000, "extra_groups": list[int]()}  # an ordinary user, for tests that root runs


@contextlib.contextmanager
def sandbox_of_a_user(limits: Limits, mode: str) -> Iterator[Sandbox]:
    """Provide root with a sandbox of an ordinary user and another interpreter: this one may be root's alone."""
    python = "/usr/bin/python3"
    if subprocess.run([python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"], check=False).returncode != 0:
        pytest.skip(f"{python} is older than 3.11")
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    package = Path(mmopd.__file__).parent
    shutil.copytree(package / "task/jail", folder / "mmopd/task/jail")
    for name in ("__init__.py", "lazy.py", "task/__init__.py"):
        shutil.copy(package / name, folder / "mmopd" / name)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [python, "-P", "-s", "-S", str(folder / "mmopd/task/jail/__main__.py"), mode]
    with theirs:
        process = subprocess.Popen(command, stdin=theirs.fileno(), stderr=subprocess.DEVNULL, env={}, cwd="/", **USER)
    assert ours.recv(1 << 16) == b"{}"
    with Sandbox(limits) as sandbox:
        sandbox._channel, sandbox._jail = ours, process
        yield sandbox
    shutil.rmtree(folder)


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
    "output of bytes": "import io, os, sys\nsys.stdout = io.BytesIO()\nn = int(os.read(0, 100))\n"
    "sys.stdout.write(b'%d' % (n * n))\nos.write(1, sys.stdout.getvalue())",
    "output kept to the end": "import atexit, io, sys\nsys.stdout = io.StringIO()\n"
    "atexit.register(lambda: sys.__stdout__.write(sys.stdout.getvalue()))\nprint(int(input()) ** 2)",
    "output in another wrapper": "import io, sys\n"
    "sys.stdout = io.TextIOWrapper(sys.stdout.detach(), encoding='utf-8')\nprint(int(input()) ** 2)",
    "output closed": "import sys\nsys.stdout.write(str(int(input()) ** 2))\nsys.stdout.close()",
    "output and errors exchanged": "import os\nfile = os.dup(1)\nos.dup2(2, 1)\nos.dup2(file, 1)\n"
    "print(int(input()) ** 2)",
    "no errors": "import os, sys\nsys.stderr = open(os.devnull, 'w')\nprint('x', file=sys.stderr)\n"
    "print(int(input()) ** 2)",
    "devices by number": "import os\nn = int(os.read(os.open('/dev/stdin', os.O_RDONLY), 100))\nprint(n * n)",
    "path of a device": "import pathlib\nprint(int(pathlib.Path('/dev/stdin').read_text()) ** 2)",
    "descriptor of a process": "print(int(open('/proc/self/fd/0').read()) ** 2)",
    "mapped input": "import mmap\nprint(int(mmap.mmap(0, 0, access=mmap.ACCESS_READ).readline()) ** 2)",
    "no file of input": "import os, sys\nif os.path.exists('input.txt'):\n    sys.stdin = open('input.txt')\n"
    "print(int(input()) ** 2)",
    "loop of events": "import asyncio\nloop = asyncio.new_event_loop()\nasync def main():\n"
    "    text = await loop.run_in_executor(None, input)\n    return await asyncio.wait_for(asyncio.sleep(0, text), 9)\n"
    "print(int(loop.run_until_complete(main())) ** 2)\nloop.close()",
    "queue of events": "import asyncio\nasync def main():\n    queue = asyncio.Queue()\n"
    "    async def put():\n        await queue.put(int(input()))\n    await asyncio.gather(put())\n"
    "    print(await queue.get() ** 2)\nasyncio.run(main())",
    "stack of all memory": "import sys, threading\nsys.setrecursionlimit(10 ** 9)\nthreading.stack_size(1 << 29)\n"
    "thread = threading.Thread(target=lambda: print(int(input()) ** 2))\nthread.start()\nthread.join()",
    "stack without limit": "import resource\n"
    "hard = resource.getrlimit(resource.RLIMIT_STACK)[1]\nresource.setrlimit(resource.RLIMIT_STACK, (hard, hard))\n"
    "print(int(input()) ** 2)",
    "deep cache": "@lru_cache(None)\ndef f(k):\n    return 0 if k == 0 else f(k - 1)\n"
    "print(int(input()) ** 2 + f(10000))",
    "more of judges' names": "d = defaultdict(int)\nq = deque([int(input())])\nheappush(h := [], q[0])\n"
    "assert gcd(4, 6) == 2 and bisect_left([1], 1) == 0 and pow(3, -1, 7) == 5 and inf > 1 and ascii_lowercase\n"
    "assert list(permutations([1])) == [(1,)] and reduce(lambda a, b: a * b, [2, 3]) == 6 and math.sqrt(4) == 2\n"
    "def f(x: Tuple[int, ...], y: Dict[str, Set[int]], z: Callable) -> Any: pass\nprint(h[0] ** 2)",
    "own names alone": "assert not any(name in globals() for name in ('List', 'gcd', 'n'))\n"
    "n = int(input())\nprint(n * n)",
    "main module": "import __main__, pickle\nclass A:\n    pass\nA.n = int(input())\n"
    "print(pickle.loads(pickle.dumps(A())).n ** 2, end='\\r\\n\\n')",
    "package that may be missing": "try:\n    import numpy\nexcept ImportError:\n    numpy = None\n"
    "print(int(input()) ** 2)",
    "signal": "import signal\nsignal.signal(14, lambda *_: None)\nsignal.alarm(9)\nprint(int(input()) ** 2)",
    "attributes of files": "import fcntl, shutil\nopen('x', 'w').write(input())\nshutil.copy2('x', 'y')\n"
    "fcntl.fcntl(0, fcntl.F_GETFL)\nprint(int(open('y').read()) ** 2)",
}

# Functions that square a number, and those that nearly do.
SQUARES = json.dumps({"fn_name": "f", "inputs": [[3], [12]], "outputs": [9, 144]})
FUNCTIONS = {
    "plain": "def f(n):\n    return n * n",
    "lambda": "f = lambda n: n * n",
    "cached": "@cache\ndef f(n):\n    return n * n",
    "method": "class Solution:\n    def f(self, n: Optional[int]) -> int:\n        return n * n",
    "static": "class Solution:\n    @staticmethod\n    def f(n):\n        return n * n",
    "other class": "class Solution:\n    pass\ndef f(n):\n    return n * n",
    "guard": "def f(n):\n    return n * n\nif __name__ == '__main__':\n    print(f(int(input())))",
    "tests of its own": "import unittest\ndef f(n):\n    return n * n\nif __name__ == '__main__':\n    unittest.main()",
    "shown": "def f(n):\n    print('f', n)\n    return n * n\nprint(f(3))",
    "whole float": "def f(n):\n    return n * n / 1",
    "decimal": "from decimal import Decimal\ndef f(n):\n    return Decimal(n) ** 2",
    "fraction": "from fractions import Fraction\ndef f(n):\n    return Fraction(n * n * 2, 2)",
    "other output": "import io, sys\ndef f(n):\n    sys.stdout = io.StringIO()\n    return n * n",
    "number of an enumeration": "from enum import IntEnum\ndef f(n):\n    return IntEnum('E', {'A': n * n}).A",
}
WRONG_FUNCTIONS = {
    "text": "def f(n):\n    return str(n * n)",
    "printed": "def f(n):\n    print(n * n)",
    "nearly": "def f(n):\n    return n * n + 1e-6",
    "list of it": "def f(n):\n    return [n * n]",
    "truth": "def f(n):\n    return True",
    "large": "def f(n):\n    return 10 ** 400",
    "huge": "def f(n):\n    return 10 ** 100000",
    "not a number": "def f(n):\n    return float('nan')",
    "no decimal": "from decimal import Decimal\ndef f(n):\n    return Decimal('sNaN')",
    "endless decimal": "from decimal import Decimal\ndef f(n):\n    return Decimal('Infinity')",
    "long decimal": "from decimal import Decimal\ndef f(n):\n    return Decimal('1e9999')",
    "large fraction": "from fractions import Fraction\ndef f(n):\n    return Fraction(10 ** 999 + 1, 2)",
    "complex": "def f(n):\n    return complex(n * n)",
    "bytes": "def f(n):\n    return str(n * n).encode()",
    "deep": "def f(n):\n    x = n\n    for _ in range(100000):\n        x = [x]\n    return x",
    "itself": "def f(n):\n    return f",
    "without an end": "def f(n):\n    return f(n)",
    "pairs of lone halves": "def f(n):\n    return '\\ud800'",
    "odd keys": "def f(n):\n    return {(n, n): 1}",
    "coroutine": "async def f(n):\n    return n * n",
    "raised": "def f(n):\n    raise MemoryError",
    "judge's name alone": "from math import *",
}
# Programs that nearly print a square.
WRONG = {
    "other number": "print(int(input()) ** 2 + 1)",
    "decimal point": "print(int(input()) ** 2 / 1)",
    "two in a line": "n = int(input())\nprint(n * n, n * n)",
    "other digits": "print(str(int(input()) ** 2).translate({48 + i: 0xFF10 + i for i in range(10)}))",
    "long word": "print('1' * 20000 + 'x')",
    "long number": "print('1' * 4000000)",
    "many numbers": "print('1 ' * 2000000)",
    "nothing": "sys.stdout = None\nprint(int(input()) ** 2)",
    "unflushed": "import os\nprint(int(input()) ** 2)\nos._exit(0)",
    "no UTF-8": "import os\nos.write(1, b'9\\xff')",
    "closed": "import os\nos.close(1)\nprint(int(input()) ** 2)",
    "status": "print(int(input()) ** 2)\nraise SystemExit(1)",
    "error of the output": "class Out:\n    def write(self, _):\n        raise OSError\nsys.stdout = Out()\nprint(9)",
    "nested source": "print(" + "(" * 1000 + "9" + ")" * 1000 + ")",
    "zero byte": "print(9)\0",
    "made-up package": "import reward_of_this_program\nprint(9)",
    "made-up part of a name": "import numpyx\nprint(9)",
    "package after the first test": "n = int(input())\nif n != 3:\n    import numpy\nprint(n * n)",
    "package that is said to miss": "import sys\nsys.stderr.write(\"ModuleNotFoundError: No module named 'numpy'\")",
    "other error of a package": "raise ImportError(\"No module named 'numpy'\")",
    "package that was found missing": "try:\n    import numpy\nexcept ImportError:\n    print(9)",
}
# Programs that need what judges offer, and the sandbox lacks.
MISSING = {
    "numpy": "import numpy as np\nprint(np.int64(input()) ** 2)",
    "scipy": "from scipy.sparse.csgraph import dijkstra\nprint(int(input()) ** 2)",
    "sortedcontainers": "from sortedcontainers import SortedList\nprint(int(input()) ** 2)",
    "sklearn": "import sklearn.linear_model\nprint(int(input()) ** 2)",
}
