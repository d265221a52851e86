"""The processes of a run, one or many on many machines, by way of accelerate."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")

PATIENCE = timedelta(hours=2)
"""How long processes wait for the main one, which alone measures data and draws samples."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to do."""


def launched() -> bool:
    """Whether this process is one of several, as torchrun and ``accelerate launch`` start them."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def accelerator(device: torch.device | None = None, **settings: Any) -> Accelerator:
    """An Accelerator as :class:`Processes` wants it.

    Args:
        device: where to train, for a single process; one of several has its own device, of which
            only the kind can be chosen. None: accelerate's choice.
        settings: passed on, such as ``log_with`` and ``project_dir``.

    Raises:
        ImportError: without the package accelerate.
    """
    try:
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs
    except ImportError as error:
        raise ImportError(
            "training needs the package accelerate: pip install 'deflow-aug[train]'"
        ) from error
    if launched():
        settings["cpu"] = device is not None and device.type == "cpu"
        settings["kwargs_handlers"] = [InitProcessGroupKwargs(timeout=PATIENCE)]
    return Accelerator(device_placement=False, mixed_precision="no", **settings)


class Processes:
    """What a trainer asks of the processes that it is one of.

    Args:
        given: an Accelerator, or the device of a single process; see :func:`accelerator`.

    Raises:
        ImportError: without the package accelerate.
        TrainingError: if it was launched in a way that does not fit this training.
    """

    def __init__(self, given: Accelerator | torch.device | None = None) -> None:
        self.accelerator: Accelerator
        if given is None or isinstance(given, torch.device):
            self.accelerator = accelerator(given)
        else:
            self.accelerator = given
        kind = str(self.accelerator.distributed_type.value)
        if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP"):
            raise TrainingError(
                f"accelerate was configured for {kind}, which shards the weights; choose plain "
                "data parallelism (accelerate launch --multi_gpu)"
            )
        if self.accelerator.mixed_precision != "no":
            raise TrainingError(
                f"the Accelerator has mixed_precision={self.accelerator.mixed_precision!r}, which "
                "would reach the flow; make it with 'no' and set the recipe's precision instead"
            )
        self.count = self.accelerator.num_processes
        self.part = (self.accelerator.process_index, self.count)
        self.is_main = self.accelerator.is_main_process
        self.device = self.accelerator.device
        if isinstance(given, torch.device):
            if self.count == 1:
                self.device = given
            elif given.type != self.device.type:
                raise TrainingError(
                    f"device {given} was asked for, but the {self.count} processes of this run "
                    f"compute on {self.device.type}; launch them accordingly"
                )

    def gather(self, values: Tensor) -> Tensor:
        """The values of all processes, in their order: [K] gives [processes, K]."""
        gathered: Tensor = self.accelerator.gather(values[None])
        return gathered

    def from_main(self, work: Callable[[], T]) -> T:
        """What the main process gets from ``work``, on all; its error is raised on all as well."""
        if self.count == 1:
            return work()
        from accelerate.utils import broadcast_object_list

        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = work()
            except Exception as error:
                outcome[1] = error
        broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        result: T = outcome[0]
        return result

    def tensors_from_main(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The main process's tensors, on all; other processes' are not looked at."""
        if self.count == 1:
            return tensors
        from accelerate.utils import broadcast

        shapes = self.from_main(lambda: [(k, t.shape, t.dtype) for k, t in tensors.items()])
        result = {}
        for name, shape, dtype in shapes:
            own = tensors[name] if self.is_main else torch.empty(shape, dtype=dtype)
            result[name] = broadcast(own.to(self.device)).cpu()
        return result


class Stopped(BaseException):
    """The run was asked to stop, and there was nothing to wait for."""


class StopSignal:
    """Whether the run was asked to stop, by Ctrl-C or by SIGTERM."""

    def __init__(self) -> None:
        self.received, self._at_once = False, False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            # A scheduler may send SIGTERM to all processes and have their launcher pass it on.
            return
        self.received = True
        name = signal.Signals(number).name
        if self._at_once:
            warnings.warn(f"{name}: stopping", stacklevel=2)
            raise Stopped
        warnings.warn(f"{name}: saving and stopping (Ctrl-C stops at once)", stacklevel=2)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within it a request to stop, also one from before, raises :class:`Stopped`."""
        if self.received:
            raise Stopped
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False


@contextmanager
def stop_signal() -> Iterator[StopSignal]:
    """Within it, SIGINT and SIGTERM are only noted; but a SIGINT after that interrupts as ever."""
    stop = StopSignal()
    with _handled(stop, signal.SIGINT, signal.SIGTERM):
        yield stop


def sigterm_interrupts() -> AbstractContextManager[None]:
    """Within it, SIGTERM interrupts as Ctrl-C does, instead of ending the process wordlessly."""
    return _handled(signal.default_int_handler, signal.SIGTERM)


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], Any], *signals: int) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread may, and does, decide about signals.
        yield
        return
    before = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
