"""Several processes under torchrun: set-up, DDP or FSDP2, and the few reductions of the scripts.

Every rank runs the same script and makes the same number of collective calls: if one rank makes a
call less, the others wait for it. What belongs to a sample (its noise, its place in a minibatch) is
keyed by its index in the GLOBAL batch, so the number of ranks changes results only by float error.

A rank is the number of a process, and world is how many processes there are. Without torchrun there
is one, rank 0 of 1, and the exchanges in here do nothing.
"""

import contextlib
import ctypes
import datetime
import os
import re
import resource
import sys
from dataclasses import dataclass

import torch
import torch.distributed as td
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from ..errors import InputError, first_line, require
from . import fsdp

# For all processes of a run to come together: torchrun starts them at once. The tries of torch,
# with their pauses, may take twice as long.
MEETING_SECONDS = 25

# In bytes. With a model as small as the embedded world's, a process is little but torch: 390 MiB.
SMALL_PROCESS = 2**29


@dataclass
class Dist:
    """This process among the others of its run. setup() makes it, and scripts hand it on."""

    rank: int
    world: int
    device: torch.device
    sharded: bool = False  # FSDP2 over several processes

    @property
    def main(self):
        """Whether this is rank 0, which alone prints and writes."""
        return self.rank == 0

    @property
    def load_device(self):
        """Where models are loaded.

        What will be sharded goes to the GPU block by block, so the whole need not fit there.
        """
        return torch.device("cpu") if self.sharded else self.device

    def print(self, *lines):
        """Print lines once for all processes."""
        if self.main:
            print(*lines, sep="\n", flush=True)

    def barrier(self):
        """Wait until all processes are here."""
        if self.world > 1:
            td.barrier()

    def share(self, index):
        """This rank's contiguous, equal share of a global batch (anything that can be sliced)."""
        size = len(index) // self.world
        return index[self.rank * size : (self.rank + 1) * size]

    def part(self, n):
        """This rank's range of n things that need not divide evenly."""
        return range(self.rank * n // self.world, (self.rank + 1) * n // self.world)

    def sum(self, tensor):
        """The sum over all ranks, on the tensor's device."""
        if self.world == 1:
            return tensor
        # A clone, since all_reduce writes into what it is given. NCCL only sends what is on a GPU.
        total = tensor.detach().clone().to(self.device)
        td.all_reduce(total)
        return total.to(tensor.device)

    def gather(self, tensor):
        """The rows of all ranks in rank order: [n_rank, ...] -> [n, ...].

        The ranks' n may differ, the rest may not.
        """
        if self.world == 1:
            return tensor
        # all_gather needs tensors of one shape. So each rank pads its rows to the largest number of
        # rows, and the padding is cut off afterwards:
        #
        #     rank 0  a a a        a a a
        #     rank 1  b        ->  b . .  ->  a a a b
        sizes = [torch.zeros(1, dtype=torch.long, device=self.device) for _ in range(self.world)]
        td.all_gather(sizes, torch.tensor([len(tensor)], device=self.device))
        longest = int(max(sizes))
        if longest == 0:
            return tensor
        padded = tensor.new_zeros(longest, *tensor.shape[1:], device=self.device)  # [longest, ...]
        padded[: len(tensor)] = tensor.to(self.device)
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        td.all_gather(parts, padded)
        rows = [part[: int(n)] for part, n in zip(parts, sizes)]
        return torch.cat(rows).to(tensor.device)

    def gather_text(self, text):
        """The texts of all ranks, one after the other."""
        # Processes exchange tensors alone, so a text travels as bytes.
        own_bytes = torch.tensor(list(text.encode(errors="backslashreplace")), dtype=torch.uint8)
        all_bytes = self.gather(own_bytes)
        return bytes(all_bytes.tolist()).decode()

    def even(self, micro_batches):
        """The same number of micro-batches on all ranks: FSDP sends something in each of them.

        The largest are cut in halves.
        """
        parts = list(micro_batches)
        if not self.sharded:
            return parts
        counts = self.gather(torch.tensor([len(parts)]))  # [world]
        most = int(counts.max())
        while len(parts) < most:
            # The sum of gradients is the same, however rows are cut into micro-batches. All ranks
            # have as many rows (share), so this one has a micro-batch of two rows or more.
            largest = max(range(len(parts)), key=lambda i: len(parts[i]))
            parts[largest : largest + 1] = parts[largest].chunk(2)
        return parts

    def together(self, function):
        """function() on every process, without collectives inside.

        An InputError on one of them is raised on all.
        """
        # If a process raised its error at once, the others would wait for it in their next
        # exchange. So all exchange messages first; without an error a message is empty.
        result = None
        message = ""
        try:
            result = function()
        except InputError as e:
            if self.world == 1:
                raise
            # One line, whose end separates it from the next process's message.
            message = " ".join(str(e).split()) + "\n"
        messages = self.gather_text(message)
        if messages:
            raise InputError(messages.split("\n")[0])
        return result

    def on_main(self, function):
        """function() on the main process alone, None on the others.

        All processes call this. An InputError is raised on all.
        """

        def alone():
            if self.main:
                return function()
            return None

        return self.together(alone)

    def wrap(self, module, total=None, dtype="float32"):
        """A module on several processes: in shards (in place), or inside DDP if it is trained.

        Alone: the module itself. total(model) is any scalar that uses all trained weights that a
        text reaches. After its first backward pass DDP re-orders its buckets, and from three ranks
        on that changes the order in which gradients are added up. So that first pass is made here:
        else the first step after a resume would differ in its last bits. FSDP wants its first pass
        through the root, which generate() is not.
        """
        # A frozen model has no gradients to exchange, so DDP is not needed; FSDP still is.
        trained = any(p.requires_grad for p in module.parameters())
        if self.world == 1 or not (trained or self.sharded):
            return module
        if self.sharded:
            model = fsdp.shard(module, self, dtype)
        else:
            # DDP waits for a gradient of each trained weight, unless it is told that some get none.
            model = DistributedDataParallel(
                module,
                gradient_as_bucket_view=True,
                find_unused_parameters=self.has_unused_weights(module, total, dtype),
            )
        # The first forward and backward pass. Its gradients are thrown away.
        with torch.set_grad_enabled(trained), autocast(self, dtype):
            value = total(model) if total else None
        if trained:
            value.backward()
            model.zero_grad(set_to_none=True)
        return model

    def has_unused_weights(self, module, total, dtype) -> bool:
        """Whether a text leaves out some trained weights, as it does those of blocks for images."""
        with autocast(self, dtype):
            value = total(module)
        value.backward()
        unused = [p for p in module.parameters() if p.requires_grad and p.grad is None]
        module.zero_grad(set_to_none=True)
        return bool(unused)


def libc():
    """The C library where it is glibc, else None."""
    try:
        library = ctypes.CDLL("libc.so.6")
        return library if hasattr(library, "mallopt") else None
    except OSError:
        return None


def keep_freed_memory():
    """Tell glibc to keep large freed blocks.

    Else every step gives them back to the kernel and pays page faults to get them again: about 4%
    of a PPO step on a CPU. Where the C library is another one, nothing happens.
    """
    if libc():
        libc().mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: its largest value, 32 MB
        libc().mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def return_freed_memory():
    """Return freed memory to the kernel, between two phases that need blocks of other sizes.

    What one phase leaves in pieces would add to the other's peak. A process below SMALL_PROCESS
    keeps its pieces: to get them back costs page faults, 4% of a PPO step on a CPU.
    """
    if libc() and resident_memory() > SMALL_PROCESS:
        libc().malloc_trim(0)


def resident_memory() -> int:
    """The bytes of memory that this process holds now, on Linux."""
    with open("/proc/self/statm") as f:
        n_pages = f.read().split()[1]
    return int(n_pages) * resource.getpagesize()


def setup(device="auto", distributed="ddp"):
    """Join the process group that torchrun's environment describes: gloo on CPU, NCCL on GPUs.

    It may be called again.
    """
    if distributed == "ddp":  # who shards has no memory to keep
        keep_freed_memory()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device here")

    # One process a GPU. The local rank numbers the processes of this machine, and so its GPUs.
    world, rank, local = read_ranks()
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise InputError(
                f"{local + 1} processes or more on this machine, but torch sees "
                f"{torch.cuda.device_count()} GPU(s)"
            )
        device = f"cuda:{local}"
        torch.cuda.set_device(device)

    if world > 1 and not td.is_initialized():
        # A process without a member of an ensemble waits for those that have one.
        a_day = datetime.timedelta(days=1)
        store = find_the_others(a_day)
        if device.startswith("cuda"):
            td.init_process_group(
                "nccl", None, a_day, world, rank, store, device_id=torch.device(device)
            )
        else:
            with meeting():
                td.init_process_group("gloo", None, a_day, world, rank, store)
        # All are connected before one can leave with an error: the others would report only that it
        # is gone.
        td.barrier()
    # A single process holds the whole model.
    sharded = distributed == "fsdp" and world > 1
    return Dist(rank, world, torch.device(device), sharded)


def read_ranks() -> tuple[int, int, int]:
    """WORLD_SIZE, RANK and LOCAL_RANK, which torchrun sets; 1, 0 and 0 without it."""
    # int() alone would accept "-1" and " 1_0 " too.
    numbers = []
    for name, default in (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        text = os.environ.get(name, default)
        is_number = text.isdecimal() and len(text) < 10
        require(is_number, f"the environment variable {name} is no number of processes: {text!r}")
        numbers.append(int(text))
    world, rank, local = numbers
    fits = rank < world and local < world
    require(fits, f"RANK {rank} and LOCAL_RANK {local} do not fit WORLD_SIZE {world}")
    return world, rank, local


def find_the_others(timeout: datetime.timedelta) -> td.Store:
    """The store by which torchrun's processes meet; `timeout` is for what they do with it later.

    InputError: the environment does not say where, or not all of them come there.
    """
    # The time to meet is short, so that a wrong MASTER_ADDR shows within a minute. Afterwards the
    # time is long, since a rank may have to wait for another rank's work.
    with meeting():
        tries = rendezvous("env://", timeout=datetime.timedelta(seconds=MEETING_SECONDS))
        store, _, _ = next(tries)
    store.set_timeout(timeout)
    # torch gives a store that it makes itself the same prefix, which keeps the keys of the
    # process group apart from torchrun's. torchrun --max_restarts starts new processes with the
    # store of those that are gone, and their addresses in it: each start has keys of its own. Of
    # several machines each counts its own restarts, so there the number would tell them apart.
    prefix = "default_pg"
    if os.environ.get("GROUP_WORLD_SIZE") == "1":  # machines
        prefix += os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return td.PrefixStore(prefix, store)


@contextlib.contextmanager
def meeting():
    """A context in which the processes of a run meet. InputError: one of them does not come."""
    try:
        with without_stderr():  # torch logs each try, with its stack
            yield
    except (ValueError, RuntimeError) as e:
        address = os.environ.get("MASTER_ADDR")
        port = os.environ.get("MASTER_PORT")
        raise InputError(
            f"the processes of this run do not find each other ({first_line(e)}; "
            f"MASTER_ADDR={address}, MASTER_PORT={port}); torchrun sets what they need"
        ) from None


@contextlib.contextmanager
def without_stderr():
    """A context in which nothing appears on stderr, of C++ neither."""
    # C++ does not use Python's sys.stderr. It writes to file descriptor 2 directly.
    usual = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(usual, 2)
        os.close(usual)
        os.close(nowhere)


def shutdown():
    """Leave the process group, if there is one."""
    if td.is_available() and td.is_initialized():
        td.destroy_process_group()


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that the memory of the machine, or of its GPU, is too small."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def lost_a_process(error: Exception) -> bool:
    """Whether an error of a collective call says only that another process is gone."""
    if not (td.is_available() and td.is_initialized()):
        return False
    if isinstance(error, (td.DistBackendError, td.DistNetworkError)):
        return True
    # gloo raises plain RuntimeErrors, which only their text tells apart.
    gone = re.search(r"Connection (closed|reset) by peer|Broken pipe|gloo", str(error))
    return isinstance(error, RuntimeError) and gone is not None


def sync_on(module, last):
    """DDP exchanges gradients in the backward pass of an optimizer batch's last micro-batch only.

    FSDP does so in each of them: waiting would need the whole model's gradients on every process.
    """
    if isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    return contextlib.nullcontext()


def autocast(dist, dtype):
    """bfloat16 matmuls over float32 master weights, or nothing."""
    return torch.autocast(dist.device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def fast_dtype(device):
    """The dtype for matrix products: bfloat16 where the processor is fast at it, else float32.

    A GPU is, and a CPU with AVX-512 BF16 or AMX.
    """
    if device != "cpu" and torch.cuda.is_available():
        # Older GPUs can emulate bfloat16, slowly.
        is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        is_fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if is_fast:
        return "bfloat16"
    return "float32"


def peak_memory_mb(dist):
    """Peak memory of this process in MiB: of the GPU where there is one, else resident."""
    if dist.device.type == "cuda":
        return torch.cuda.max_memory_allocated(dist.device) / 2**20
    # macOS counts in bytes, Linux in KiB.
    units_in_a_mb = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / units_in_a_mb
