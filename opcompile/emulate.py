"""Code for another processor, run here: the library of an artifact, loaded into an emulated arm64 and called.

It shows that the machine code computes what it should where no such machine is at hand, in libraries for Linux and
for macOS, and finds an access beyond a tensor (each ends where its pages end, nothing lies behind them, and NaN before
it), a write to an input, and memory that is read before anything is written to it (it is full of NaN). It cannot show
speed, what threads do to each other, or that a system's own loader takes the library.

Unicorn, which is QEMU's processors, runs the code, and LIEF reads the library. What a kernel calls of the C library
stands here, for one thread; a call of anything else is an error that names it.
"""

from __future__ import annotations

import importlib.util
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opcompile.errors import EngineError, TargetError, VerificationError
from schedules.division import up

_PAGE = 4096
# Where in the emulated memory things lie. What is allocated comes last, with a page of nothing behind each piece.
_CODE, _STUBS, _STACK, _VARIABLES, _HEAP = (n << 32 for n in range(1, 6))
_STACK_BYTES, _STUBS_BYTES, _VARIABLES_BYTES = 8 << 20, 1 << 14, 1 << 14
# A function that is not in the library is an instruction that returns; what it does happens before.
_RETURN = struct.pack("<I", 0xD65F03C0)
_STUB_BYTES = 16
# What memory is full of before anything is written to it, in each type: what is read too early shows.
_NAN = b"\xff"
# What a target has for which code runs on any arm64, the first ones among them.
_OF_THE_FIRST = ("asimd",)
_ALLOCATED = "what was allocated"
# What finds the variables of a thread on Linux; macOS has a function for it.
_FIND_VARIABLE = "place of a variable"
# Functions that are done when they have returned 0: with one thread, without a file, a variable or a huge page.
_NOTHING = (
    *("pthread_mutex_lock", "pthread_mutex_unlock", "pthread_atfork", "__register_atfork"),
    *("fopen", "getenv", "madvise"),
)
# What float64 layers call of the library of mathematics.
_OF_A_NUMBER: dict[str, Callable[[float], Any]] = {
    "erf": math.erf,
    "exp": np.exp,
    "expm1": np.expm1,
    "log1p": np.log1p,
    "tanh": np.tanh,
}


@dataclass(frozen=True, slots=True)
class _Image:
    """What a loader reads of a library, whose addresses begin at 0.

    ``segments`` are addresses, contents and sizes; ``pointers`` places and the addresses in the library that they
    point to, ``imports`` places and functions that are elsewhere, ``words`` places and plain numbers.
    """

    segments: list[tuple[int, bytes, int]]
    pointers: dict[int, int]
    imports: dict[int, str]
    words: dict[int, int]
    initialisers: list[int]
    exports: dict[str, int]


def _of_linux(library: Any, elf: Any) -> _Image:
    kinds, tags = elf.Relocation.TYPE, elf.DynamicEntry.TAG
    image = _Image(
        [(s.virtual_address, bytes(s.content), s.virtual_size) for s in library.segments if s.type.name == "LOAD"],
        {},
        {},
        {},
        [],
        {symbol.name: symbol.value for symbol in library.exported_symbols},
    )
    for each in library.relocations:
        if each.type == kinds.AARCH64_RELATIVE:
            image.pointers[each.address] = each.addend
        elif each.type == kinds.AARCH64_TLSDESC:
            image.imports[each.address], image.words[each.address + 8] = _FIND_VARIABLE, each.addend
        elif each.type in (kinds.AARCH64_JUMP_SLOT, kinds.AARCH64_GLOB_DAT) and each.symbol.value == 0:
            image.imports[each.address] = each.symbol.name
        else:
            raise EngineError(f"the library has a relocation that is not emulated: {each.type.name}")
    first, size = (library.get(tag).value for tag in (tags.INIT_ARRAY, tags.INIT_ARRAYSZ))
    image.initialisers.extend(image.pointers[place] for place in range(first, first + size, 8))
    return image


def _of_macos(library: Any) -> _Image:
    def word(place: int) -> int:
        return int.from_bytes(bytes(library.get_content_from_virtual_address(place, 8)), "little")

    pointers = {each.address: word(each.address) for each in library.relocations}
    first = [s for s in library.sections if s.name == "__mod_init_func"]
    return _Image(
        [(s.virtual_address, bytes(s.content), s.virtual_size) for s in library.segments],
        pointers,
        {each.address: each.symbol.name.removeprefix("_") for each in library.bindings},
        {},
        [pointers[place] for s in first for place in range(s.virtual_address, s.virtual_address + s.size, 8)],
        {symbol.name.removeprefix("_"): symbol.value for symbol in library.exported_symbols},
    )


def require_emulated(architecture: str) -> None:
    """Raise `TargetError` where no processor of ``architecture`` is emulated, `EngineError` without what does it."""
    if architecture != "aarch64":
        raise TargetError(f"{architecture} is not emulated")
    if absent := [name for name in ("unicorn", "lief") if importlib.util.find_spec(name) is None]:
        raise EngineError(
            f"emulating {architecture} needs the package {' and '.join(absent)}; pip install 'opcompile[emulate]'"
        )


class Emulator:
    """The library of an artifact in an emulated processor, ready to run. For one thread at a time."""

    instead = ("an arm64 processor", "the library ran on an emulated one, with one thread")

    def __init__(
        self, library: Path, features: Sequence[str] = (), pointers: Sequence[str | None] = ("x", "w", "b")
    ) -> None:
        """Load ``library``, of a target with ``features``, whose call has its inputs by the names of ``pointers``.

        Raises `EngineError` for what is not emulated.
        """
        import lief

        lief.logging.disable()
        parsed = lief.parse(str(library))
        if parsed is None:
            raise EngineError(f"{library} is no library that can be read; compile the layer again")
        on_linux = isinstance(parsed, lief.ELF.Binary)
        image = _of_linux(parsed, lief.ELF) if on_linux else _of_macos(parsed)
        self._pointers = pointers
        self._processor = _Processor(variadic_on_stack=not on_linux, first=tuple(features) == _OF_THE_FIRST)
        self._exports = {name: _CODE + place for name, place in image.exports.items()}
        self._processor.load(image)

    def run(self, inputs: Mapping[str, NDArray[Any]], y: NDArray[Any], batch: int) -> None:
        """Fill ``y``, contiguous, from ``inputs``: x, w (packed) and b of a layer, or the operands of a derivative.

        Raises `VerificationError` for anything that is wrong with the kernel, `EngineError` for what is not emulated.
        """
        on, exports = self._processor, self._exports
        places = [on.put(inputs[name], name) if name and name in inputs else 0 for name in self._pointers]
        result = on.place(y.nbytes, "the result")
        try:
            if on.call(exports["opcompile_run"], 1, batch, *places, result) & 0xFFFFFFFF:
                raise VerificationError(f"the kernel failed: {on.text(on.call(exports['opcompile_error']))}")
            y.reshape(-1).view(np.uint8)[:] = np.frombuffer(on.written(result, y.nbytes), np.uint8)
        finally:
            for place in filter(None, (*places, result)):
                on.free(place)


class _Processor:
    """An arm64 with its memory, and what a kernel calls of a C library."""

    def __init__(self, *, variadic_on_stack: bool, first: bool) -> None:
        import unicorn
        from unicorn import arm64_const

        self._unicorn, self._registers, self._variadic_on_stack = unicorn, arm64_const, variadic_on_stack
        # functions that are not in the library, by the addresses where they are called
        self._stubs: dict[int, str] = {}
        self._functions: dict[str, Callable[..., int]] = {
            **dict.fromkeys(_NOTHING, lambda *_: 0),
            _FIND_VARIABLE: lambda descriptor, *_: self._word(descriptor + 8),
            "_tlv_bootstrap": lambda descriptor, *_: _VARIABLES + self._word(descriptor + 16),
            "posix_memalign": self._allocate,
            "free": self._release,
            "memcpy": self._copy,
            "memset": self._fill,
            "bzero": lambda place, size, *_: self._fill(place, 0, size),
            "snprintf": self._print,
        }
        # by the addresses where they begin, their sizes and what they are
        self._pieces: dict[int, tuple[int, str]] = {}
        self._top, self._fault = _HEAP, ""
        self._uc = uc = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
        # Those between the first arm64 and the one with all that Unicorn knows are not emulated.
        uc.ctl_set_cpu_model(arm64_const.UC_CPU_ARM64_A72 if first else arm64_const.UC_CPU_ARM64_MAX)
        uc.reg_write(arm64_const.UC_ARM64_REG_TPIDR_EL0, _VARIABLES)
        for place, size in ((_STUBS, _STUBS_BYTES), (_STACK, _STACK_BYTES), (_VARIABLES, _VARIABLES_BYTES)):
            uc.mem_map(place, size)
        uc.mem_write(_STACK, _NAN * _STACK_BYTES)
        uc.mem_write(_STUBS, _RETURN)
        uc.hook_add(unicorn.UC_HOOK_CODE, self._enter, begin=_STUBS + _STUB_BYTES, end=_STUBS + _STUBS_BYTES)
        uc.hook_add(unicorn.UC_HOOK_MEM_INVALID, self._refuse)

    def load(self, image: _Image) -> None:
        """Put a library where it belongs, and initialise it."""
        self._uc.mem_map(_CODE, _pages(max(address + size for address, _, size in image.segments)))
        for address, content, _ in image.segments:
            self._uc.mem_write(_CODE + address, content)
        words = {
            **{place: _CODE + address for place, address in image.pointers.items()},
            **{place: self._stub(name) for place, name in image.imports.items()},
            **image.words,
        }
        for place, word in words.items():
            self._uc.mem_write(_CODE + place, struct.pack("<Q", word))
        for address in image.initialisers:
            self.call(_CODE + address)

    def place(self, size: int, name: str) -> int:
        """Return where a tensor of ``size`` bytes begins, on pages of its own, so that it ends where they do."""
        return self._map(size, _PAGE, name) + _pages(size) - size

    def put(self, array: NDArray[Any], name: str) -> int:
        """Copy ``array`` to a place of its own, only to be read; return where it begins."""
        content = array.tobytes()
        place = self.place(len(content), name)
        self._uc.mem_write(place, content)
        self._uc.mem_protect(_down(place), _pages(len(content)), self._unicorn.UC_PROT_READ)
        return place

    def written(self, place: int, size: int) -> bytes:
        """Return the tensor at ``place``. Raises `VerificationError` where something was written before it."""
        begin = _down(place)
        if self.read(begin, place - begin).strip(_NAN):
            raise VerificationError(f"the library writes before the beginning of {self._pieces[begin][1]}")
        return self.read(place, size)

    def free(self, place: int) -> None:
        """Give back what lies at ``place``."""
        begin = _down(place)
        size, _ = self._pieces.pop(begin)
        self._uc.mem_unmap(begin, size)

    def read(self, place: int, size: int) -> bytes:
        """Return what lies at ``place``."""
        return bytes(self._uc.mem_read(place, size))

    def text(self, place: int) -> str:
        """Return the C string at ``place``."""
        found = b""
        while not found.endswith(b"\0"):
            found += self.read(place + len(found), 1)
        return found[:-1].decode(errors="replace")

    def call(self, function: int, *arguments: int) -> int:
        """Call what begins at address ``function``. Raises `VerificationError` where it goes wrong."""
        names, uc = self._registers, self._uc
        for number, argument in enumerate(arguments):
            uc.reg_write(names.UC_ARM64_REG_X0 + number, argument)
        uc.reg_write(names.UC_ARM64_REG_SP, _STACK + _STACK_BYTES)
        uc.reg_write(names.UC_ARM64_REG_X30, _STUBS)
        self._fault = ""
        # In a thread of its own: in this one an interrupt would be heard only when the call has returned, or lost in a
        # function of the C library.
        with ThreadPoolExecutor(1) as thread:
            running = thread.submit(uc.emu_start, function, _STUBS)
            try:
                wait([running])
            except BaseException:
                uc.emu_stop()
                raise
        try:
            running.result()
        except self._unicorn.UcError as error:
            at = uc.reg_read(names.UC_ARM64_REG_PC) - _CODE
            raise VerificationError(f"the library, at {at:#x}: {self._fault or error}") from None
        return int(uc.reg_read(names.UC_ARM64_REG_X0))

    def _map(self, size: int, alignment: int, name: str) -> int:
        begin = up(self._top, max(alignment, _PAGE))
        self._uc.mem_map(begin, _pages(size))
        self._uc.mem_write(begin, _NAN * _pages(size))
        self._pieces[begin] = _pages(size), name
        self._top = begin + _pages(size) + _PAGE
        return begin

    def _refuse(self, _uc: Any, access: int, address: int, size: int, _value: int, _: Any) -> bool:
        """Say what an invalid access was; the processor stops."""
        verb = "writes" if access in (self._unicorn.UC_MEM_WRITE_UNMAPPED, self._unicorn.UC_MEM_WRITE_PROT) else "reads"
        self._fault = f"it {verb} {size} bytes at {address:#x}, where nothing lies"
        for begin, (length, name) in self._pieces.items():
            if begin <= address < begin + length:
                self._fault = f"it {verb} to {name}"
            elif begin + length <= address < begin + length + _PAGE:
                self._fault = f"it {verb} {size} bytes, {address - begin - length} bytes beyond the end of {name}"
        return False

    # --- the C library ---

    def _stub(self, name: str) -> int:
        """Return a new address of a function that is called by its name."""
        address = _STUBS + (len(self._stubs) + 1) * _STUB_BYTES
        self._stubs[address] = name
        self._uc.mem_write(address, _RETURN)
        return address

    def _enter(self, _uc: Any, address: int, _size: int, _: Any) -> None:
        """Do what the function at ``address`` does; its one instruction, which returns, is next."""
        name, first = self._stubs[address], self._registers.UC_ARM64_REG_X0
        if name in _OF_A_NUMBER:
            register = self._registers.UC_ARM64_REG_D0
            (number,) = struct.unpack("<d", struct.pack("<Q", self._uc.reg_read(register)))
            with np.errstate(all="ignore"):
                result = float(_OF_A_NUMBER[name](number))
            self._uc.reg_write(register, *struct.unpack("<Q", struct.pack("<d", result)))
        elif name in self._functions:
            given = [self._uc.reg_read(first + number) for number in range(4)]
            try:
                self._uc.reg_write(first, self._functions[name](*given))
            except self._unicorn.UcError as error:
                raise VerificationError(f"the library calls {name}: {error}") from None
        else:
            raise EngineError(f"the library calls {name}, which is not emulated")

    def _word(self, place: int) -> int:
        return int.from_bytes(self.read(place, 8), "little")

    def _write(self, place: int, content: bytes) -> None:
        """Write where the code may: Unicorn's own function overlooks what is closed."""
        for begin, last, may in self._uc.mem_regions():
            if begin < place + len(content) and place <= last and not may & self._unicorn.UC_PROT_WRITE:
                raise self._unicorn.UcError(self._unicorn.UC_ERR_WRITE_PROT)
        self._uc.mem_write(place, content)

    def _allocate(self, answer: int, alignment: int, size: int, _: int) -> int:
        self._uc.mem_write(answer, struct.pack("<Q", self._map(size, alignment, _ALLOCATED)))
        return 0

    def _release(self, place: int, *_: int) -> int:
        if place and self._pieces.get(place, (0, ""))[1] != _ALLOCATED:
            raise VerificationError("the library frees what is not allocated")
        if place:
            self.free(place)
        return 0

    def _copy(self, to: int, source: int, size: int, _: int) -> int:
        self._write(to, self.read(source, size))
        return to

    def _fill(self, place: int, byte: int, size: int, *_: int) -> int:
        self._write(place, bytes([byte & 0xFF]) * size)
        return place

    def _print(self, place: int, size: int, form: int, first: int) -> int:
        """Print a string where the format is one, and else the format: texts of errors, without their numbers."""
        text = self.text(form)
        if text == "%s":
            stack = self._registers.UC_ARM64_REG_SP
            text = self.text(self._word(self._uc.reg_read(stack)) if self._variadic_on_stack else first)
        content = text.encode()
        if size:
            self._write(place, content[: size - 1] + b"\0")
        return len(content)


def _down(place: int) -> int:
    return place // _PAGE * _PAGE


def _pages(size: int) -> int:
    """Return the bytes of the pages that hold ``size``, one page at least."""
    return up(max(size, 1), _PAGE)
