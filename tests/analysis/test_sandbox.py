"""Programs that mean harm do none, and count as failed.

What is tested is what a model may write by accident or in a bad mood, not somebody who wants to break out: a program
that digs through the frames of the interpreter can still pass without being right, and the kernel is shared.
"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from analysis.sandbox import NONE, Limits, Sandbox
from errors import RunError, UserError

ROOT = Path(__file__).resolve().parents[2]
MEMORY = 600 + os.getpid() % 300  # MiB; also tells the processes of this test from others
PATIENT, HASTY = Limits(seconds=30, memory_mib=MEMORY), Limits(seconds=1, memory_mib=MEMORY)
SECRET = "SANDBOX_TEST_TOKEN"


@pytest.fixture(scope="module")
def allowed():
    try:
        return Sandbox(PATIENT).isolation
    except RunError as e:
        pytest.skip(f"no namespaces here: {e}")


def running() -> int:
    """Processes of programs; a process that dies is still there for an instant."""
    word, count = str(MEMORY << 20).encode(), 0
    for _ in range(50):
        count = 0
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                count += word in path.read_bytes().split(b"\0")
            except OSError:  # it has just ended
                continue
        if not count:
            break
        time.sleep(0.1)
    return count


HOSTILE = {
    "infinite loop": (HASTY, "while True: pass", {"timeout"}),
    "sleep": (HASTY, "import time; time.sleep(60)", {"timeout"}),
    "sleeping child": (
        HASTY,
        "import os, time\nif os.fork(): os._exit(0)\nos.setsid(); time.sleep(60)",
        {"ended early"},
    ),
    "looping children": (
        HASTY,
        "import os\nfor _ in range(3):\n  if os.fork() == 0:\n    os.setsid()\n    while True: pass\nos.wait()",
        {"timeout"},
    ),
    "memory": (PATIENT, "x = bytearray(4 << 30)", {"MemoryError"}),
    "memory bit by bit": (PATIENT, "x = []\nwhile True: x.append(bytearray(1 << 24))", {"MemoryError"}),
    "exit without a word": (PATIENT, "import os; os._exit(0)", {"ended early"}),
    "exit": (PATIENT, "raise SystemExit(0)", {"SystemExit"}),
    "crash": (PATIENT, "import ctypes; ctypes.string_at(0)", {"ended early"}),
    "kills itself": (PATIENT, "import os; os.kill(os.getpid(), 9)", {"ended early"}),
    "kills the others": (
        PATIENT,
        "import os\nfor pid in (os.getppid(), 1, -1):\n  try: os.kill(pid, 9)\n  except OSError: pass\nraise KeyError",
        {"KeyError"},
    ),
    "kills its group": (PATIENT, "import os; os.killpg(0, 9)", {"ended early", "PermissionError"}),
    "big file": (PATIENT, "open('x', 'wb').write(bytes(8 << 20))", {"OSError"}),
    "many files": (
        PATIENT,
        "for n in range(100):\n  with open(str(n), 'wb') as f: f.write(bytes(1 << 20))",
        {"OSError"},
    ),
    "network outside": (PATIENT, "import socket; socket.create_connection(('1.1.1.1', 53), 5)", {"OSError"}),
    "own network": (
        PATIENT,
        "import socket\ns = socket.create_server(('127.0.0.1', 0))\nsocket.create_connection(s.getsockname(), 5)",
        {"OSError"},
    ),
    "pretends to be done": (
        PATIENT,
        "import os\nfor fd in range(64):\n  try: os.write(fd, b'0' * 64)\n  except OSError: pass\nos._exit(0)",
        {"other exception"},
    ),
    "floods the report": (
        PATIENT,
        "import os\nfor fd in range(3, 64):\n  try:\n    while True: os.write(fd, b'x' * 4096)\n  except OSError: pass",
        {"other exception"},
    ),
    "asks for input": (PATIENT, "input()", {"EOFError"}),
    "no Python": (PATIENT, "def f(:\0", {"SyntaxError", "ValueError"}),
    "no text": (PATIENT, "'\ud800' + 1", {"TypeError"}),
    "error of its own": (PATIENT, "class passed(Exception): pass\nraise passed", {"other exception"}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_fails_and_leaves_nothing(allowed, name):
    limits, program, reasons = HOSTILE[name]
    start = time.monotonic()
    verdict = Sandbox(limits).run(program)
    assert not verdict.passed
    assert verdict.reason in reasons
    assert time.monotonic() - start < 25  # none was waited for
    assert running() == 0


def test_processes_are_counted(allowed):
    if "own" not in allowed or "0 4294967295" not in " ".join(Path("/proc/self/uid_map").read_text().split()):
        pytest.skip("this user has other processes, or may have none that count")
    program = """
import os, time
for n in range(200):
    try:
        if os.fork() == 0:
            time.sleep(60)
    except BlockingIOError:
        assert n == 7, n
        raise
"""
    assert Sandbox(PATIENT).run(program).reason == "BlockingIOError"
    assert running() == 0


def test_what_a_program_may_do(allowed):
    """Right programs pass, whatever they print, write into their folder, and leave running."""
    programs = [
        "for i in range(1_000_000): print(i)",
        "import sys\nfor i in range(100_000): print(i, file=sys.stderr)",
        "open('x', 'w').write('1')\nimport os\nos.mkdir('y')\nassert sorted(os.listdir()) == ['x', 'y']",
        "import os, time\nif os.fork() == 0:\n  os.setsid()\n  time.sleep(60)",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()",
        f"import os\nassert {SECRET!r} not in os.environ and len(os.environ) < 12",
        "import collections, decimal, hashlib, heapq, itertools, json, math, random, re, tempfile, typing, zlib\n"
        "with tempfile.TemporaryFile() as f: f.write(b'1')",
        "assert 'é\u4e00' == chr(233) + chr(0x4E00)",
    ]
    os.environ[SECRET] = "secret"
    try:
        verdicts = Sandbox(PATIENT).run_many([*programs, "assert False", programs[0]], workers=3)
    finally:
        del os.environ[SECRET]
    assert [v.reason for v in verdicts] == [*["passed"] * len(programs), "AssertionError", "passed"]
    assert verdicts[-1] is verdicts[0]  # run once
    assert running() == 0


def test_files_outside_are_neither_written_nor_read(allowed, tmp_path):
    (tmp_path / "secret").write_text("x")
    places = [tmp_path, ROOT, Path.home(), Path("/dev/shm"), Path("/tmp"), Path("/var/tmp"), Path("/etc"), Path("/usr")]
    places += [Path("/"), Path("/dev"), Path(sys.prefix), Path(sys.base_prefix), Path(sys.executable).parent]
    name = f"sandbox-test-{os.getpid()}"
    program = f"""
import os
assert not os.path.exists({str(tmp_path / "secret")!r}) and not os.path.exists({str(ROOT / "errors.py")!r})
assert not os.path.exists("/proc/self") and not os.path.exists("/etc/passwd")
for path in {[str(p / name) for p in places]!r}:
    for write in (lambda: open(path, "w").write("x"), lambda: os.mkdir(path), lambda: os.symlink("/", path)):
        try:
            write()
        except OSError:
            continue
        raise KeyError(path)
"""
    assert Sandbox(PATIENT).run(program).reason == "passed"
    assert not [p for p in places if os.path.lexists(p / name)]


def test_nothing_is_reached_through_the_network(allowed):
    """Not even what listens on this machine."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        connect = f"import socket; socket.create_connection({server.getsockname()!r}, 5)"
        assert Sandbox(PATIENT, unsafe=True).run(connect).reason == "passed"  # it is there
        server.settimeout(5)
        server.accept()[0].close()
        assert Sandbox(PATIENT).run(connect).reason == "OSError"
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()


def test_the_file_system_cannot_be_made_writable_again(allowed):
    name = f"sandbox-test-{os.getpid()}"
    program = f"""
import ctypes, os, subprocess
for command in ("mount -o remount,bind,rw /usr", "mount -o remount,rw /", "umount -l /usr", "mount -t proc none /proc",
                "unshare -r -m mount -o remount,bind,rw /usr", "umount /sandbox"):
    assert subprocess.run(command.split(), capture_output=True).returncode != 0, command
libc = ctypes.CDLL(None)
assert libc.prctl(39, 0, 0, 0, 0) == 1  # no new privileges
assert not any(libc.prctl(23, number, 0, 0, 0) == 1 for number in range(64))  # no capability in the bounding set
REMOUNT, BIND = 32, 4096
def attack():
    for place in (b"/", b"/usr", b"/dev/null", b"/etc/ld.so.cache"):
        assert libc.mount(None, place, None, REMOUNT | BIND, None) != 0, place
    libc.mount(b"/usr", b"/usr", None, BIND, None)
    assert libc.mount(None, b"/usr", None, REMOUNT | BIND, None) != 0
    for place in ("/", "/usr", "/usr/bin", "/dev"):
        try:
            open(place + "/{name}", "w")
        except OSError:
            continue
        raise KeyError(place)
attack()
libc.unshare(0x10000000 | 0x00020000)  # a user namespace, with all capabilities in it, and one of mounts
attack()
"""
    assert Sandbox(PATIENT).run(program).reason == "passed"
    assert not [p for p in ("/", "/usr", "/usr/bin", "/dev") if os.path.exists(f"{p}/{name}")]


CHILD = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from analysis.sandbox import Limits, Sandbox
sandbox = Sandbox(Limits(seconds=30, memory_mib={MEMORY}), unsafe="unsafe" in sys.argv)
print(sandbox.isolation)
for program in ("pass", "open('/usr/x', 'w')", "import os; assert not os.path.exists({str(ROOT / "run.py")!r})",
                "import ctypes; assert ctypes.CDLL(None).mount(b'/', b'/dev', None, 4096, None) != 0"):
    print(sandbox.run(program).reason)
"""


def without(*privileges: str, words: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [*privileges, sys.executable, "-c", CHILD, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_caller_s_umask_does_not_matter(allowed):
    before = os.umask(0o077)
    try:
        assert Sandbox(PATIENT).run("open('x', 'w').write('1')").passed
    finally:
        os.umask(before)


#: A key in a session keyring of its own, then a program that looks for it; both by system calls.
KEYS = r"""
import ctypes, os, sys
from analysis.sandbox import Limits, Sandbox
add, keyctl = {"x86_64": (248, 250), "aarch64": (217, 219)}[os.uname().machine]
call = ctypes.CDLL(None).syscall
if call(keyctl, 1, None) < 0 or call(add, b"user", b"planted", b"SECRET", 6, -3) < 0:
    sys.exit("no keyrings here")
look = f"import ctypes\nassert ctypes.CDLL(None).syscall({keyctl}, 10, -3, b'user', b'planted', 0) < 0"
exec(compile(look.replace("< 0", "> 0"), "here", "exec"))
print(Sandbox(Limits(seconds=30)).run(look))
"""


def test_the_caller_s_keys_are_not_there(allowed):
    if os.uname().machine not in ("x86_64", "aarch64"):
        pytest.skip("system call numbers are known for x86_64 and aarch64 only")
    command = [sys.executable, "-c", KEYS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    if "no keyrings here" in done.stderr:
        pytest.skip("this kernel has no keyrings, or does not allow them")
    assert done.stdout.startswith("Verdict(passed=True"), done.stdout + done.stderr


def test_isolation_without_a_user_of_its_own(allowed):
    """As for a user that is not root: with the capabilities of a user namespace, which the program does not keep."""
    if subprocess.run(["unshare", "--map-root-user", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no user namespaces here")
    done = without("unshare", "--map-root-user")
    assert done.stdout.splitlines() == [
        "namespaces (network, processes, files), as this user, without capabilities",
        "passed",
        "OSError",
        "passed",
        "passed",
    ], done.stderr


def test_programs_are_refused_where_they_cannot_be_isolated():
    if os.geteuid() != 0:
        pytest.skip("only root can give up what isolation needs")
    powerless = ("setpriv", "--inh-caps=-all", "--bounding-set=-all")
    done = without(*powerless)
    assert done.returncode != 0
    assert "cannot isolate programs here" in done.stderr
    assert "not permitted" in done.stderr
    assert "--unsafe" in done.stderr
    done = without(*powerless, words=("unsafe",))
    assert done.stdout.splitlines()[:2] == [NONE, "passed"]


def test_unsafe_programs_still_have_limits():
    sandbox = Sandbox(HASTY, unsafe=True)
    assert sandbox.isolation == NONE
    verdicts = sandbox.run_many(["x = bytearray(4 << 30)", "while True: pass", "raise SystemExit(0)"], workers=3)
    assert [v.reason for v in verdicts] == ["MemoryError", "timeout", "SystemExit"]
    assert running() == 0


def test_mistakes_are_refused():
    for wrong in ({"seconds": 0}, {"seconds": float("nan")}, {"file_mib": 0}, {"processes": 0}, {"memory_mib": 8}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            Limits(**wrong)
    with pytest.raises(UserError, match="workers=0"):
        Sandbox(unsafe=True).run_many(["pass"], workers=0)
    assert Sandbox().run_many([]) == []
    with pytest.raises(RunError, match="raise the limits"):
        _ = Sandbox(Limits(seconds=1e-9)).isolation
