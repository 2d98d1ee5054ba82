"""How many threads a call uses where nobody says: a container's share of the processors' time counts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import opcompile

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")

MANY = 64


def usable(folder: Path, groups: str, asked: str = "CPU_COUNT(set)") -> int:
    """Return what ``usable_cpus`` finds on a machine of many processors; ``asked`` is what tells how many."""
    (folder / "groups").write_text(groups)
    source = folder / "program.c"
    source.write_text(
        "#define _GNU_SOURCE\n#include <sched.h>\n#include <unistd.h>\n#undef CPU_COUNT\n"
        f'#define {asked} {MANY}\n#include "cpus.h"\n'
        "int main(void) {\n  int first = usable_cpus();\n  remove(CGROUPS_OF_PROCESS);\n"  # it is read once
        '  printf("%d", first == usable_cpus() ? first : -1);\n}\n'
    )
    names = {"CGROUPS": folder / "mounted", "CGROUPS_OF_PROCESS": folder / "groups"}
    words = [f'-D{name}="{place}"' for name, place in names.items()]
    here = Path(opcompile.__file__).parent
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", f"-I{here}"]
    subprocess.run(["cc", *flags, *words, str(source), "-o", str(folder / "program")], check=True)
    return int(subprocess.run([folder / "program"], check=True, capture_output=True, text=True).stdout)


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / "mounted" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        # version 2
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "max 100000\n"}, MANY),
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "9000000 100000\n"}, MANY),
        ("0::/\n", {}, MANY),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n", "cpu.max": "max 100000\n"}, 3),
        ("0::/a/b\n", {"a/b/cpu.max": "400000 100000\n", "a/cpu.max": "300000 100000\n"}, 3),
        ("0::/a/b\n", {"a/b/cpu.max": "200000 100000\n", "a/cpu.max": "300000 100000\n"}, 2),
        # as a container names it that does not see the groups above its own
        ("0::/../b\n", {"cpu.max": "200000 100000\n"}, 2),
        # nothing above where they are mounted
        ("0::/a\n", {"../cpu.max": "200000 100000\n"}, MANY),
        # version 1
        ("3:cpuset:/\n1:cpu,cpuacct:/\n", {"cpu/cpu.cfs_quota_us": "500000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 5),
        ("1:cpu:/a\n0::/\n", {"cpu/a/cpu.cfs_quota_us": "-1\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, MANY),
        ("1:cpu:/docker/x\n", {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        # both at once
        ("1:cpu:/\n0::/\n", {"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ("1:cpuset:/\n", {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, MANY),
        # what nobody expects
        ("", {}, MANY),
        ("nonsense\n0\n:\n", {"cpu.max": "100000 100000\n"}, MANY),
        ("0::/\n", {"cpu.max": "\n"}, MANY),
        ("0::/\n", {"cpu.max": "100000 0\n"}, MANY),
    ],
)
def test_a_container_uses_what_it_is_granted(groups: str, files: dict[str, str], expected: int, tmp_path: Path) -> None:
    write(tmp_path, files)
    assert usable(tmp_path, groups) == expected


def test_it_uses_no_more_where_there_are_more_processors_than_a_set_holds(tmp_path: Path) -> None:
    lines = "sched_getaffinity(process, size, set) (memset(set, 0, size), -1)", "CPU_COUNT(set) 1", "sysconf(name)"
    asked = "\n#define ".join(lines)
    assert usable(tmp_path, "", asked) == MANY
    write(tmp_path, {"cpu.max": "200000 100000\n"})
    assert usable(tmp_path, "0::/\n", asked) == 2
