"""What the trainers share: endless data, atomic checkpoints, exact resumption, and logs that survive a kill."""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import signal
import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import TrainOutput, rotate_checkpoints
from transformers.utils import logging

from spa3r.data import SkippedReport
from spa3r.disk import alone_in, writing
from spa3r.models.base import nonfinite_tensors
from spa3r.models.model_card import CARD, is_own_card, write_model_card
from spa3r.models.released import quote_keys
from spa3r.secret import without_secrets
from spa3r.signals import STOP_SIGNALS
from spa3r.training.arguments import RunArguments
from spa3r.training.checkpoints import (
    LAST_FILE,
    OPTIMIZER_FILE,
    STATE_FILE,
    UNFINISHED,
    fault_of,
    last_checkpoint,
    load_state,
    newest_intact,
    publish,
    random_state,
    remove_unfinished,
    save_state,
    set_aside,
    set_random_state,
    write_checksums,
    writing_into,
)
from spa3r.training.logs import JsonLinesCallback
from spa3r.training.optimizers import MuonAndAdamW, layer_matrices

logger = logging.get_logger(__name__)

ARGUMENTS_FILE = "training_args.json"


class BatchLoader:
    """Whole batches, epoch after epoch without end, from any position.

    Attributes:
        epoch: Epoch of the last batch that was returned, from 0.
        batch: How many batches of that epoch were returned.
    """

    def __init__(self, batches: Any, **options: Any):
        # The loader has its own generator: it draws a seed from it each time, which must not advance the global one.
        self.loader = DataLoader(batches, batch_size=None, generator=torch.Generator(), **options)
        self.dataset = batches
        self.epoch = self.batch = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            self.dataset.set_epoch(self.epoch)
            if self.batch:
                self.dataset.skip_batches(self.batch)
            before = self.batch
            for batch in self.loader:
                self.batch += 1
                yield batch
            if self.batch == before == 0:
                raise ValueError("The data set must hold at least one batch for every process, and has none.")
            self.epoch, self.batch = self.epoch + 1, 0

    def close(self) -> None:
        """Stop the worker processes."""
        end_workers(self.loader._iterator)
        self.loader._iterator = None

    @property
    def progress(self) -> float:
        """Number of epochs completed, including the fraction of the current one where its length is known."""
        try:
            return self.epoch + self.batch / max(1, len(self.dataset))
        except TypeError:  # a stream
            return float(self.epoch)


def _leave_signals_to_the_main_process(worker: int) -> None:
    # Ctrl-C and schedulers signal the whole group, but the main process still needs its batches to finish a step.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_workers(iterator: Any) -> None:
    """Terminate the workers explicitly, since they ignore the signal by which Python would stop them."""
    if hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()


class Window:
    """Sums between two log entries. Tensors stay on the device until they are read."""

    def __init__(self):
        self.names: tuple[str, ...] = ()
        self.sums: Tensor | None = None  # the weights of all terms, then their weighted values
        self.counts: Counter[str] = Counter()
        self.start = time.perf_counter()
        self.paused = 0.0

    def add(self, loss: Tensor, losses: Mapping[str, Tensor], weights: float | Sequence[float]) -> None:
        """Add the terms of a batch with their weights, unless the loss is not finite."""
        self.names = tuple(losses)
        values = torch.stack(list(losses.values())).detach().float()
        factors = torch.as_tensor(weights, dtype=values.dtype).expand_as(values).to(values.device)
        values = torch.cat([factors, values * factors])
        values = torch.where(torch.isfinite(loss.detach()), values, torch.zeros_like(values))
        self.sums = values if self.sums is None else self.sums + values

    def totals(self) -> list[float]:
        """The sums as numbers; none if nothing was added."""
        return [] if self.sums is None else self.sums.tolist()

    @staticmethod
    def means(sums: Sequence[float], names: Sequence[str]) -> dict[str, float]:
        """The means of the terms from sums over any number of windows; nan for terms without weight."""
        return {
            name: value / weight if weight else math.nan
            for name, weight, value in zip(names, sums[: len(names)], sums[len(names) :])
        }

    @contextlib.contextmanager
    def pause(self) -> Generator[None]:
        """Exclude the enclosed work from the training time."""
        start = time.perf_counter()
        yield
        self.paused += time.perf_counter() - start


class ResumableTrainer(Trainer):
    """transformers' Trainer for whole batches from a data set that defines its own order.

    The loss of a step is a mean over all processes and accumulated batches. A step whose gradient is not finite is
    dropped in all processes, and the samples that caused it are named. Checkpoints hold no pickles and appear
    atomically. A resumed run continues exactly where the saved one was, in the data too.

    A subclass counts what a batch has (``_count``), computes the loss, and defines the content of a checkpoint
    (``_save_weights``, ``_load_weights``).
    """

    args: RunArguments
    model: nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler

    training_data: Sequence[str] = ()
    """Names of the training data, for the model card."""

    UNIT = "scenes"
    """What a batch consists of, as shown to the user."""

    COUNTED: ClassVar[tuple[str, ...]]
    """Keys of the numbers that :meth:`_count` adds to a batch; the loss is a mean over the first."""

    def __init__(self, model: nn.Module, args: RunArguments, callbacks: Sequence[TrainerCallback] = (), **kwargs: Any):
        super().__init__(
            model, args, callbacks=[*callbacks, _StopAtTheEndOfTheStep(self), JsonLinesCallback()], **kwargs
        )
        self.remove_callback(PrinterCallback)  # log.jsonl has everything
        if self.args.muon_learning_rate is not None and self.is_sharded:
            raise ValueError(
                "`muon_learning_rate` must be None where FSDP or DeepSpeed shards the model: Muon needs whole "
                "matrices. Leave it out, or let each process hold the whole model."
            )
        self.model_accepts_loss_kwargs = True  # our loss is already scaled by `num_items_in_batch`
        self.loader: BatchLoader | None = None  # while it trains
        self.nonfinite_steps = 0
        self.stop_requested = False
        self.skipped = SkippedReport(getattr(self.train_dataset, "max_bad_share", None))
        self._window = Window()
        self._step_counts: dict[str, float] = {}  # over all processes
        self._step_batches: list[Any] = []  # of this process, to name the cause of a gradient that is not finite
        self._is_stopping = False
        self._writing_dir: Path | None = None  # set while a checkpoint is written
        self._host_group: dist.ProcessGroup | None = None
        if dist.is_initialized() and dist.get_world_size() > 1:
            # Counts and flags are exchanged between hosts, without waiting for an accelerator.
            group = dist.new_group(backend="gloo")
            self._host_group = group if isinstance(group, dist.ProcessGroup) else None

    @property
    def _unwrapped(self) -> Any:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """FSDP2 shards only; autocast handles mixed precision, as everywhere else. FSDP2's own mixed precision casts
        every input of a layer: the cameras of PRoPE, poses, and the loss."""
        args = super()._build_accelerator_args(**kwargs)
        plugin = args["fsdp_plugin"]
        if plugin is None and parse_flag_from_env("ACCELERATE_USE_FSDP"):
            plugin = FullyShardedDataParallelPlugin()  # from the launcher's configuration file
        if plugin is not None and plugin.fsdp_version == 2:
            plugin.mixed_precision_policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        return args | {"fsdp_plugin": plugin}

    # Data

    def get_train_dataloader(self) -> BatchLoader:  # ty: ignore[incompatible-method-override]  # it is only iterated over
        """The batches of all epochs, not prepared by accelerate, which slices packed tensors along dimension 0."""
        options = self._loader_options()
        self.loader = BatchLoader(self.train_dataset, persistent_workers="num_workers" in options, **options)
        return self.loader

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], int]:
        """The batches of a step, and the number of items in its loss, over all processes."""
        batches = [_next(epoch_iterator) for _ in range(num_batches)]
        for batch in batches:
            with as_value_error():
                self._count(batch)
        own = [sum(batch[name] for batch in batches) for name in self.COUNTED]
        *counts, stop = self._sum_over_hosts([*own, self.stop_requested])
        self._is_stopping = bool(stop)
        self._step_batches, self._step_counts = [], dict(zip(self.COUNTED, counts))
        return batches, max(int(counts[0]), 1)  # a step may have nothing to learn from

    def _count(self, batch: dict[str, Any]) -> None:
        """Add the numbers of `COUNTED` to a batch; count in the window, and what could not be read."""
        raise NotImplementedError

    def _loader_options(self) -> dict[str, Any]:
        args = self.args
        options: dict[str, Any] = {"pin_memory": args.dataloader_pin_memory and args.device.type == "cuda"}
        if args.dataloader_num_workers:
            # With several processes a plain fork is not safe: threads wait for messages of the other processes, and a
            # worker that is forked while one of them holds a lock waits for it forever.
            several = self._host_group is not None and "forkserver" in multiprocessing.get_all_start_methods()
            start = "forkserver" if several else None
            options |= {
                "num_workers": args.dataloader_num_workers,
                "prefetch_factor": args.dataloader_prefetch_factor,
                "multiprocessing_context": args.dataloader_multiprocessing_context or start,
                "worker_init_fn": _leave_signals_to_the_main_process,
            }
        return options

    def _sum_over_hosts(self, numbers: Sequence[float]) -> list[float]:
        if self._host_group is None:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(total, group=self._host_group)
        return total.tolist()

    def _gather_from_hosts(self, value: Any) -> list[Any]:
        if self._host_group is None:
            return [value]
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, value, group=self._host_group)
        return gathered

    # A step

    @staticmethod
    def get_optimizer_cls_and_kwargs(
        args: Any, model: Any = None
    ) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        """As in transformers, with Muon if requested."""
        optimizer, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if args.muon_learning_rate is None:
            return optimizer, options
        return MuonAndAdamW, options | {"matrices": layer_matrices(model), "muon_lr": args.muon_learning_rate}

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of one batch; returns its share of the loss of the step, 0 if that is not finite."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        return torch.where(torch.isfinite(loss), loss, torch.zeros_like(loss))

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return inputs  # done in compute_loss, where the model's inputs are known

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> float | None:
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is None:
            return None
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if not math.isfinite(norm):
            self._drop_step(model, norm)
        return norm

    def _drop_step(self, model: nn.Module, norm: float) -> None:
        """Make the optimizer skip this step. The norm is that of all processes, so all of them get here."""
        names = sorted({name for part in self._gather_from_hosts(self._nonfinite_parts()) for name in part})
        if self.accelerator.scaler is not None and not names:
            return  # the scaler of float16 searches for the largest factor, and drops the step itself
        cause = f"{self.UNIT} {', '.join(names)}" if names else "no loss: the gradient alone is not finite"
        if self.is_deepspeed_enabled:  # it has already taken its step inside `backward`
            raise ValueError(
                f"The gradient of step {self.state.global_step + 1} is not finite ({norm}) because of {cause}, and "
                "DeepSpeed has already used it. Take them out of the data and resume from the last checkpoint."
            )
        self._check_finite()  # otherwise the run would drop every further step
        self.nonfinite_steps += 1
        logger.warning(
            f"Step {self.state.global_step + 1} is dropped: its gradient is not finite ({norm}) because of {cause}."
        )
        self.log({"nonfinite_step": self.state.global_step + 1, f"nonfinite_{self.UNIT}": ", ".join(names)})
        if self.nonfinite_steps > self.args.max_nonfinite_steps:
            raise ValueError(
                f"{self.nonfinite_steps} steps had to be dropped because their gradient is not finite, more than "
                f"`max_nonfinite_steps` = {self.args.max_nonfinite_steps}; the last one because of {cause}. Take such "
                f"{self.UNIT} out of the data, lower `learning_rate`, or train in float32."
            )
        if self.accelerator.scaler is None:
            for parameter in model.parameters():
                parameter.grad = None  # optimizers skip such parameters, weight decay included

    def _check_finite(self) -> None:
        """Reject trained weights that are not finite, in all processes.

        Raises:
            ValueError: Some weights are not finite. The message names the checkpoint with finite ones.
        """
        trained = ((name, value) for name, value in self.model.named_parameters() if value.requires_grad)
        names = nonfinite_tensors(trained)
        (count,) = self._sum_over_hosts([len(names)])
        if not count:
            return
        last = last_checkpoint(self.args.folder)
        earlier = "there is no earlier checkpoint" if last is None else f"the last finite ones are in {last}"
        raise ValueError(
            f"After step {self.state.global_step} weights of the model are not finite ({quote_keys(names, 3)}): a step "
            f"was too large. They are not saved; {earlier}. Lower `learning_rate`, and start over or from those."
        )

    def check_learned(self) -> None:
        """Reject a finished run that learned nothing.

        Raises:
            ValueError: Every step of the run was dropped.
        """
        if 0 < self.state.global_step <= self.nonfinite_steps:
            raise ValueError(
                f"All {self.nonfinite_steps} steps were dropped because their gradient is not finite: nothing was "
                f"learned, and no model is saved. Look in {JsonLinesCallback.FILE} for the {self.UNIT} that caused it, "
                "lower `learning_rate`, or train in float32."
            )

    def _nonfinite_parts(self) -> list[str]:
        """The samples in this process's batches of the step that caused a non-finite gradient."""
        raise NotImplementedError

    # Logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As transformers' ``log``; entries of the training loss also get all terms and the throughput."""
        if self.loader is not None:
            self.state.epoch = self.loader.progress
        if "loss" in logs and "learning_rate" in logs:
            logs = self._training_entry(logs)
        elif "train_runtime" in logs:  # counted in samples, which a trainer of whole batches doesn't count
            logs = {key: value for key, value in logs.items() if key in ("train_runtime", "train_steps_per_second")}
        super().log(logs, start_time)
        self.state.log_history.clear()  # it would grow without bound, as would every checkpoint; log.jsonl has it all

    def _training_entry(self, logs: dict[str, float]) -> dict[str, float]:
        window, self._window = self._window, Window()
        sums = window.totals()
        seconds = time.perf_counter() - window.start - window.paused
        names = sorted(window.counts)
        counts = self._sum_over_hosts([*(window.counts[name] for name in names), *sums])
        means = Window.means(counts[len(names) :], window.names)
        entry = {"loss": sum(means.values()) if means else math.nan} | (means if len(means) > 1 else {})
        entry |= {key: value for key, value in logs.items() if key not in entry}
        entry |= self._counted(dict(zip(names, counts)), seconds)
        if self.args.device.type == "cuda":
            entry["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return entry

    def _counted(self, counts: Mapping[str, float], seconds: float) -> dict[str, float]:
        """What the window counted, in the form of the log."""
        raise NotImplementedError

    def skipped_by_all(self) -> SkippedReport:
        """What could not be read in all processes. Every process must call this."""
        total = SkippedReport()
        for counts in self._gather_from_hosts(self.skipped.counts()):
            total.count_again(counts)
        return total

    # Evaluation

    def _log_evaluation(self, numbers: Mapping[str, float], prefix: str) -> dict[str, float]:
        """Log the results of an evaluation with the prefix before each name, and pass them to the callbacks."""
        metrics = {f"{prefix}_{name}": value for name, value in numbers.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # Checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint atomically: write it elsewhere, flush it to disk, then move it."""
        self._check_finite()
        output_dir = self.args.folder
        name = f"checkpoint-{self.state.global_step}"
        cure = "Free space; the same command resumes from the last checkpoint."
        with self._window.pause(), writing(output_dir / name, cure):
            with writing_into(output_dir) if self.args.should_save else contextlib.nullcontext():
                self._wait_for_everyone()
                self._writing_dir = output_dir / UNFINISHED
                try:
                    super()._save_checkpoint(model, trial)
                finally:
                    self._writing_dir = None
                self._wait_for_everyone()
                if self.args.should_save:
                    written = output_dir / UNFINISHED / name
                    if self.state.best_global_step:  # its path is the one where it was written
                        best = output_dir / f"checkpoint-{self.state.best_global_step}"
                        self.state.best_model_checkpoint = str(best)
                        self.state.save_to_json(str(written / LAST_FILE))
                    write_checksums(written)
                    publish(written, output_dir / name)
                    rotate_checkpoints(
                        str(output_dir), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=False
                    )
            self._wait_for_everyone()

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._writing_dir or super()._get_output_dir(trial))

    def _wait_for_everyone(self) -> None:
        if self._host_group is not None:
            dist.barrier(group=self._host_group)

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP or DeepSpeed shards the model and writes and reads its checkpoints."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save the model, the processor, and the arguments as JSON."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._save_weights(self._unwrapped, folder, state_dict)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        arguments = without_secrets(json.loads(self.args.to_json_string()))
        (folder / ARGUMENTS_FILE).write_text(json.dumps(arguments, indent=2), encoding="utf-8")

    def _save_weights(self, model: Any, folder: Path, state_dict: dict[str, Tensor] | None) -> None:
        """Write what `_load_weights` reads."""
        raise NotImplementedError

    def _load_weights(self, model: Any, checkpoint: Path) -> None:
        """Load the weights of a checkpoint into the model."""
        raise NotImplementedError

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_sharded:  # formats of accelerate and DeepSpeed
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            save_state(self.optimizer.state_dict(), Path(output_dir) / OPTIMIZER_FILE)

    def _save_scaler(self, output_dir: str) -> None:
        """Saved with the random states, see below."""

    def _save_rng_state(self, output_dir: str) -> None:
        """Save all small states that a resumed run needs, in one file."""
        random_states, skipped = self._gather_from_hosts(random_state()), self.skipped_by_all().counts()
        if not self.args.should_save:
            return
        scaler, loader = self.accelerator.scaler, self.loader or self.get_train_dataloader()
        state = {
            "processes": self.accelerator.num_processes,
            "random": random_states,
            "scheduler": None if self.is_sharded else self.lr_scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "epoch": loader.epoch,
            "batch": loader.batch,
            "nonfinite_steps": self.nonfinite_steps,
            "skipped": skipped,
        }
        save_state(state, Path(output_dir) / STATE_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_sharded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        model = self.accelerator.unwrap_model(self.model if model is None else model, keep_torch_compile=False)
        self._load_weights(model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = load_state(Path(checkpoint) / STATE_FILE)
        if state["processes"] != self.accelerator.num_processes:
            raise ValueError(
                f"The checkpoint {checkpoint} was saved by {state['processes']} processes, and this run has "
                f"{self.accelerator.num_processes}: it could not continue with its data. Start as many, or begin a "
                "new run from its weights (`model.init_from` in a configuration file)."
            )
        if self.is_sharded:
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            self.optimizer.load_state_dict(load_state(Path(checkpoint) / OPTIMIZER_FILE))
            self.lr_scheduler.load_state_dict(state["scheduler"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        loader = self.loader or self.get_train_dataloader()
        loader.epoch, loader.batch = state["epoch"], state["batch"]
        self._restore_counts(state)

    def _restore_counts(self, state: dict[str, Any]) -> None:
        self.nonfinite_steps = state["nonfinite_steps"]
        if self.args.process_index == 0:  # the counts cover all processes
            with as_value_error():
                self.skipped.count_again(state["skipped"])

    def restore(self, checkpoint: str | Path) -> None:
        """Load the weights of a checkpoint and the counts of its run, without training; with
        ``args.load_best_model_at_end``, load the weights of the best checkpoint."""
        self.state = TrainerState.load_from_json(str(Path(checkpoint) / LAST_FILE))
        best = self.best_checkpoint(self.state) if self.args.load_best_model_at_end else None
        self._load_from_checkpoint(str(best or checkpoint))
        self._restore_counts(load_state(Path(checkpoint) / STATE_FILE))

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Loaded above."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            set_random_state(load_state(Path(checkpoint) / STATE_FILE)["random"][self.args.process_index])

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As transformers' ``train``. Incomplete files of a killed run are removed first, and the folder is locked for
        this run until it ends.

        Args:
            resume_from_checkpoint: A checkpoint; True: the newest intact one in ``args.output_dir``.
            *args: As in transformers.
            **kwargs: As in transformers.

        Raises:
            ValueError: The checkpoint is damaged, another run is using the folder, the model's weights are not
                finite, or every step was dropped.
        """
        if names := nonfinite_tensors(self.model.named_parameters()):
            raise ValueError(
                f"The weights of the model must be finite before it is trained, and {quote_keys(names, 3)} are not. "
                "The files that it was loaded from are damaged, or come from a training that failed: load others."
            )
        checkpoint = self._checked(resume_from_checkpoint) if resume_from_checkpoint else None
        with alone_in(self.args.folder) if self.args.process_index == 0 else contextlib.nullcontext():
            if self.args.should_save:
                remove_unfinished(self.args.folder)
            self._window = Window()
            try:
                output = super().train(checkpoint, *args, **kwargs)
            finally:
                if self.loader is not None:
                    self.loader.close()
        if not self._is_stopping:
            self.check_learned()
        return output

    def _checked(self, checkpoint: str | Literal[True]) -> str:
        """Return the checkpoint after checking that it is intact."""
        folder = self.args.folder
        if checkpoint is True:
            intact, damaged = newest_intact(folder)
            if intact is None:
                raise ValueError(f"`resume_from_checkpoint` needs a checkpoint in {folder}, got none. Leave it out.")
            for place, fault in damaged.items():
                logger.warning(set_aside(place, fault) if self.args.should_save else f"{place} is damaged ({fault})")
            return str(intact)
        if (fault := fault_of(Path(checkpoint))) is not None:
            raise ValueError(
                f"The checkpoint {checkpoint} is damaged ({fault}). Resume from an older one; "
                "resume_from_checkpoint=True takes the newest intact one."
            )
        return checkpoint

    def best_checkpoint(self, state: TrainerState) -> Path | None:
        """The checkpoint with the best evaluation, if it is intact; otherwise None, with a warning."""
        if state.best_model_checkpoint is None:
            return None
        best = self.args.folder / Path(state.best_model_checkpoint).name  # the folder may have been moved
        fault = fault_of(best)
        if fault is None:
            return best
        logger.warning(f"The best checkpoint {best} is damaged ({fault}): the last one takes its place.")
        return None

    def _load_best_model(self) -> None:
        best = self.best_checkpoint(self.state)
        self.state.best_model_checkpoint = None if best is None else str(best)
        if best is not None and self.is_sharded:
            super()._load_best_model()
        elif best is not None:
            self._load_from_checkpoint(str(best))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As transformers' ``save_model``; every file is written atomically.

        Raises:
            ValueError: Weights are not finite.
            WriteError: The model can't be written.
        """
        if not _internal_call:
            self._check_finite()
        if _internal_call or self.is_sharded:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            place = Path(output_dir or self.args.folder)
            cure = "Free space; the same command saves the model from the last checkpoint."
            with writing(place, cure), writing_into(place) as folder:
                super().save_model(str(folder), _internal_call=True)
                (folder / CARD).unlink(missing_ok=True)  # it doesn't list the training data
                if not is_own_card(place / CARD):
                    write_model_card(self.accelerator.unwrap_model(self.model), folder, self.training_data)
                for file in sorted(folder.iterdir()):
                    publish(file, place / file.name)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """0: they are not counted."""
        return 0


class _StopAtTheEndOfTheStep(TrainerCallback):
    """Saves and ends the training once all processes know that one of them was asked to stop."""

    def __init__(self, trainer: ResumableTrainer):
        self.trainer = trainer

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.trainer._is_stopping:
            control.should_save = control.should_training_stop = True
        return control


def _next(batches: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """The next batch; errors of a worker are raised without its traceback."""
    try:
        return next(batches)
    except (RuntimeError, ValueError) as error:
        kind = type(error).__name__
        raise ValueError(str(error).rpartition(f"\n{kind}: ")[2].strip()) from error


@contextlib.contextmanager
def as_value_error() -> Generator[None]:
    """Raise an excess of unreadable data as a ValueError, as other faults that the user can fix."""
    try:
        yield
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def load_strictly(model: nn.Module, checkpoint: Path, may_lack: Sequence[str] = ()) -> None:
    """Load the tensors of a checkpoint into a model with the same names.

    Args:
        model: The model.
        checkpoint: A folder with ``model.safetensors``, or with several shards of it.
        may_lack: Paths of modules that may be missing from the checkpoint.

    Raises:
        ValueError: Tensors are missing or unexpected.
    """
    weights: dict[str, Tensor] = {}
    for file in sorted(checkpoint.glob("model*.safetensors")):
        weights |= load_file(file)
    result = model.load_state_dict(weights, strict=False)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    loaded = {id(parameters[key]) for key in weights if key in parameters}
    left_out = tuple(f"{path}." for path in may_lack)
    missing = [
        key
        for key in result.missing_keys
        # A tied parameter is saved under one of its names.
        if not key.startswith(left_out) and id(parameters.get(key)) not in loaded
    ]
    if missing or result.unexpected_keys:
        raise ValueError(
            f"The checkpoint {checkpoint} doesn't fit the model: it lacks {missing or 'nothing'} and has the "
            f"unexpected keys {result.unexpected_keys}. Resume with the configuration that it was saved with."
        )


def can_omit_frozen_parts(model: Any, folder: Path) -> bool:
    """Whether a checkpoint in `folder` may omit the frozen parts of a Spa3R because they can be loaded again."""
    try:
        with model.naming_frozen_parts(False, folder):
            return True
    except ValueError:
        return False


__all__ = ["BatchLoader", "ResumableTrainer"]
