"""One call from a spec to an artifact on disk, verified and loaded."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opcompile import artifact
from opcompile.errors import VerificationError
from opcompile.lower import PlanName, lower
from opcompile.runtime import Artifact, load
from opcompile.spec import ConvTranspose3d
from opcompile.target import target as named
from opcompile.verify import verify as check

if TYPE_CHECKING:
    from numpy.typing import NDArray


def compile(
    spec: ConvTranspose3d,
    target: str = "llvm",
    plan: PlanName = "best",
    into: str | Path | None = None,
    *,
    weight: NDArray[Any] | None = None,
    bias: NDArray[Any] | None = None,
    verify: bool = False,
) -> Artifact:
    """Compile ``spec`` for ``target``, write the artifact directory ``into`` and load it.

    ``weight`` (canonical, ``(C, M/g, kD, kH, kW)``) and ``bias`` (``(M,)``), when known, are packed
    into the artifact. Without ``into`` the directory is a temporary one that lives as long as the
    process. With ``verify`` the outputs are checked first: `VerificationError` when they are wrong,
    and then the directory is left for inspection. Raises `SpecError`, `TargetError`, `EngineError`.
    """
    machine = named(target)
    folder = Path(into) if into is not None else Path(tempfile.mkdtemp(prefix="opcompile-"))
    written = artifact.write(lower(spec, machine, plan), folder, weight=weight, bias=bias)
    loaded = load(written)
    if verify:
        report = check(loaded)
        artifact.add_report(written, report.to_json())
        if not report.passed:
            raise VerificationError(f"{written}: outputs lie beyond the error bound; report.json has the details")
    return loaded
