"""tools/budget.py: what it counts against what PyTorch counts, allocates and holds."""
import contextlib
import copy
import gc
import re
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import error_line
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import distill
import lens
import rl
import train
from kit.lora import LORA_TARGETS, add_lora, lora_parameters
from tools import budget

FULL = lens.SIZES["full"].transformer
TOKENS = (1024 // 16)**2          # of a picture of 1024 x 1024


# --- Work: the rules against what PyTorch counts --------------------------------------------------

def counted_by_torch(run):
    """FLOPs of run(). Its softmax is counted on neither side."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


class Subject:
    """A denoiser, all of it or an adapter on it to be learnt, and two pictures."""

    def __init__(self, size, grid, text, rank, recompute):
        self.config = lens.SIZES[size].transformer
        self.tokens, self.text, self.rank = grid[0] * grid[1], text, rank
        self.model = lens.build(size)
        unread = set(self.model.unread())
        for name, p in self.model.named_parameters():
            p.requires_grad_(name not in unread)
        if rank:
            add_lora(self.model, rank, rank)
        self.model.set_recompute(recompute)
        batch = budget.random_batch(self.config, 2, grid, text)
        self.batch = replace(batch, mask=None)
        self.t = torch.rand(2)

    def loss(self):
        return train.flow_matching_loss(self.model, self.batch, self.batch.tokens, self.t).mean()


CASES = [("nano", (4, 6), 7, 0), ("toy", (6, 6), 30, 0), ("small", (16, 16), 100, 0),
         ("small", (16, 16), 100, 8)]


@pytest.mark.parametrize("size, grid, text, rank", CASES)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_step_is_what_torch_counts(size, grid, text, rank, recompute):
    """Of a frozen base with an adapter too, and with recomputation: no forward too many."""
    subject = Subject(size, grid, text, rank, recompute)
    counted = counted_by_torch(lambda: subject.loss().backward())
    account = budget.step_flops(subject.config, subject.tokens, text, recompute, rank)
    # autograd skips the gradients of what enters the first layers, which are not recomputed either
    assert counted == pytest.approx(2 * account, rel=0.08 if recompute == "full" else 0.05)
    if recompute != "full":
        assert account == train.flops(subject.model, subject.tokens, text)


@pytest.mark.parametrize("size, grid, text, rank", CASES)
def test_a_forward_is_what_torch_counts(size, grid, text, rank):
    """Of a frozen base too: it was a fifth too small, a third of a step that makes no gradients of
    weights."""
    subject = Subject(size, grid, text, rank, "none")
    with torch.no_grad():
        counted = counted_by_torch(subject.loss)
    account = budget.forward_flops(subject.config, subject.tokens, text, rank)
    assert counted == pytest.approx(2 * account, rel=0.05)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_gradient_through_a_frozen_model_is_what_torch_counts(recompute):
    """As that of distillation's heads goes through the teacher to the picture."""
    subject = Subject("small", (16, 16), 100, 0, recompute)
    subject.model.requires_grad_(False)
    subject.batch.tokens.requires_grad_(True)
    counted = counted_by_torch(lambda: subject.loss().backward())
    account = budget.frozen_step_flops(subject.config, 256, 100, recompute)
    assert counted == pytest.approx(2 * account, rel=0.08 if recompute == "full" else 0.05)


def test_what_a_step_costs_in_forwards():
    """In products with weights; attention's backward costs two of its forwards, whatever learns."""
    attention = 4 * FULL.num_layers * FULL.inner_dim * (TOKENS + 128)**2
    forward = budget.forward_flops(FULL, TOKENS, 128) - attention
    assert forward + attention == pytest.approx(17e12, rel=0.03)           # FACTS.md
    assert forward == pytest.approx(12e12, rel=0.06)

    def products(recompute, rank):
        passes = 4 if recompute == "full" else 3                           # of attention
        step = budget.step_flops(FULL, TOKENS, 128, recompute, rank)
        return (step - passes * attention) / forward

    assert products("none", 0) == pytest.approx(3, rel=1e-6)
    assert products("full", 0) == pytest.approx(4, rel=1e-6)
    # A thin adapter over a frozen base: there and back; there, there again and back.
    assert products("none", 1) == pytest.approx(2, rel=0.01)
    assert products("full", 1) == pytest.approx(3, rel=0.01)


def test_train_rl_and_distillation_count_by_the_same_rules():
    """One learning step of an adapter costs the same in all three, and so does a forward."""
    config, rank = lens.SIZES["small"].transformer, 8
    tokens = (512 // 16)**2
    learn = budget.step_flops(config, tokens, 128, "full", rank)
    forward = budget.forward_flops(config, tokens, 128, rank)

    settings = replace(rl.SETTINGS["full"], prompts=2, group=3, times=5, sampler_steps=7, base=512,
                       rank=rank)
    of_train = budget.train_work(config, 512, 4, rank, "full")
    of_rl = budget.rl_work(config, settings, "full")
    assert sum(work.flops for work in of_train) == pytest.approx(4 * learn)
    sampling, frozen, new = [work.flops for work in of_rl]
    assert sampling == pytest.approx(2 * 3 * 7 * forward)
    assert new == pytest.approx(2 * 3 * 5 * learn)
    reference = budget.forward_flops(config, tokens, 128)
    assert frozen == pytest.approx(2 * 3 * 5 * (forward + reference))

    # Distillation, whose adapters are on the modulation too. Without heads: four updates of the
    # fake and one of the student, each after 1.5 steps of the student's sampler on average.
    learn = budget.step_flops(config, tokens, 128, "full", rank, distill.LORA_TARGETS)
    student = budget.forward_flops(config, tokens, 128, rank, distill.LORA_TARGETS)
    work = budget.distill_work(config, 512, 4, rank, "full", gan=False)
    amounts = {part.name: part.flops for part in work}
    assert amounts["fake learns"] == pytest.approx(4 * 4 * learn)
    assert amounts["student learns"] == pytest.approx(4 * learn)
    assert amounts["student, without gradient"] == pytest.approx(4 * 11.5 * student)
    with_heads = budget.distill_work(config, 512, 4, rank, "full", gan=True)
    assert with_heads[:4] == work
    assert len(with_heads) == 6


def test_a_steps_work_is_what_torch_counts_of_the_real_one():
    """distill.py's five updates, and a group of rl.py."""
    trial = budget.Trial("nano", area=96, pictures=4, rank=4, text=budget.TEXT, device="cpu")
    _, _, step = budget.distill_trial(trial)
    counted = counted_by_torch(step)
    work = budget.distill_work(trial.config, 96, 4, 4, "none", gan=True)
    # Updates have 0, 1, 2, 3 and 3 simulated steps; the account takes the mean, 1.5.
    student = budget.forward_flops(trial.config, 36, budget.TEXT, 4, distill.LORA_TARGETS)
    simulated = 4 * student * (0 + 1 + 2 + 3 + 3 - 5 * 1.5)
    assert counted == pytest.approx(sum(part.flops for part in work) + simulated, rel=0.1)

    _, _, step = budget.rl_trial(trial)
    settings = replace(rl.SETTINGS["full"], prompts=1, group=4, times=1, rank=4, base=96)
    _, frozen, new = budget.rl_work(trial.config, settings, "none")
    assert counted_by_torch(step) == pytest.approx(frozen.flops + new.flops, rel=0.1)


# --- Memory: what is held all the time ------------------------------------------------------------

def bytes_of(tensors):
    """Of distinct tensors: shared ones count once."""
    distinct = {t.data_ptr(): t.numel() * t.element_size() for t in tensors}
    return sum(distinct.values())


def moments_of(optimizers):
    return [t for optimizer in optimizers for state in optimizer.state.values()
            for name, t in state.items() if name != "step"]


def amounts_of(recipe, counts):
    return {part.name: part.bytes for part in budget.fixed_parts(recipe, counts)}


def test_rl_holds_what_is_counted():
    trial = budget.Trial("nano", area=64, pictures=2, rank=4, text=16, device="cpu")
    config = trial.config
    model = budget.random_model(config, "cpu", torch.bfloat16)
    settings = replace(rl.SETTINGS["nano"], rank=4)
    policies = rl.Policies(model, settings, seed=0)
    for p in policies.parameters("new"):
        p.grad = torch.zeros_like(p)
    policies.optimizer.step()

    counts = budget.parameter_counts(config, rank=4)
    amounts = amounts_of("rl", counts)
    average = policies.parameters("ema")
    assert bytes_of(model.parameters()) == amounts["weights"] + amounts["average"]
    assert bytes_of(average) == amounts["average"]
    assert bytes_of(p.grad for p in policies.parameters("new")) == amounts["gradients"]
    assert bytes_of(moments_of([policies.optimizer])) == amounts["moments"]
    assert sum(amounts.values()) == 2 * counts.base + 6 * 4 * counts.adapter


@pytest.mark.parametrize("rank", [0, 4])
def test_distillation_holds_what_is_counted(rank):
    config = lens.SIZES["nano"].transformer
    base = budget.random_model(config, "cpu", torch.float32)
    heads = distill.make_heads(config, seed=0)
    players = distill.make_players(base, heads, seed=0, lora=rank)
    optimizers = distill.make_optimizers(players, distill.settings_for("nano", lora=rank))
    for who in ("student", "fake", "heads"):
        for p in players.weights(who).values():
            p.grad = torch.zeros_like(p)
        optimizers[who].step()

    amounts = amounts_of("distill", budget.parameter_counts(
        config, rank, distill.LORA_TARGETS, gan=True))
    held = list(heads.parameters())
    for model in players.models.values():
        held += model.parameters()
    learnt = list(players.weights("student").values())
    assert bytes_of(held) == amounts["weights"] + amounts["average"]
    assert bytes_of(p.grad for p in [*learnt, *heads.parameters()]) == amounts["gradients"]
    assert bytes_of(moments_of(optimizers.values())) == amounts["moments"]


@pytest.mark.parametrize("rank", [0, 4])
def test_training_holds_what_is_counted(rank):
    run = budget.Run(out=None)
    stage = train.Stage(areas=(64,), batch=(2,), steps=1, lr=1e-4)         # AdamW alone
    learner = train.make_learner(run, lens.build("nano"), stage, lora=rank)
    learnt = list(learner.trained().values())
    for p in learnt:
        p.grad = torch.zeros_like(p)
    for optimizer in learner.optimizers:
        optimizer.step()

    amounts = amounts_of("train", budget.parameter_counts(learner.denoiser.config, rank))
    weights = list(learner.denoiser.parameters())
    assert bytes_of(weights) == amounts["weights"]
    assert bytes_of([*weights, *learner.ema.parameters()]) - bytes_of(weights) == amounts["average"]
    assert bytes_of(p.grad for p in learnt) == amounts["gradients"]
    assert bytes_of(moments_of(learner.optimizers)) == amounts["moments"]


@pytest.mark.parametrize("targets", [LORA_TARGETS, distill.LORA_TARGETS])
def test_parameters_are_those_of_a_real_model(targets):
    model = lens.build("nano")
    base = sum(p.numel() for p in model.parameters())
    add_lora(model, 4, 4, targets)
    counts = budget.parameter_counts(model.config, 4, targets, gan=True)
    heads = distill.make_heads(model.config, seed=0)
    assert counts.base == base == 89_872
    assert counts.adapter == counts.learnt == sum(p.numel() for p in lora_parameters(model))
    assert 0 < counts.adapter < 20_000
    assert counts.heads == sum(p.numel() for p in heads.parameters())

    counts = budget.parameter_counts(model.config)
    assert counts.adapter == counts.heads == 0
    unread = set(lens.build("nano").unread())
    assert counts.learnt == sum(p.numel() for name, p in lens.build("nano").named_parameters()
                                if name not in unread)


# --- Memory: activations --------------------------------------------------------------------------

def test_recomputing_keeps_less():
    config = lens.SIZES["nano"].transformer
    none, selective, full = [budget.activation_bytes(config, how, 4, (8, 8), text=16)
                             for how in ("none", "selective", "full")]
    assert none > 1.5 * selective
    assert selective > 1.5 * full
    assert full > 0


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("how", ("none", "selective", "full"))
def test_the_memory_account_is_what_the_allocator_gives(how):
    """Against the bytes that PyTorch's allocator hands out in a real step, on the toy."""
    count, grid, text = 8, (6, 6), 24
    config, measured = lens.SIZES["toy"].transformer, {}
    batch = budget.random_batch(config, count, grid, text)
    t = torch.rand(count)
    # The table of angles is kept from step to step, so it is not the step's.
    lens.rope_table(grid, text, tuple(config.axes_dims_rope), torch.device("cpu"))

    @contextlib.contextmanager
    def allocated(name):
        # An earlier test's model, held by a cycle, would be freed at any time and counted as ours.
        gc.collect()
        cpu = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
            yield
        measured[name] = sum(event.self_cpu_memory_usage for event in profile.events())

    with allocated("weights"):
        model = lens.build("toy").train()
    unread = set(model.unread())
    for name, p in model.named_parameters():
        p.requires_grad_(name not in unread)
    model.set_recompute(how)
    with allocated("average"):
        frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
        average = copy.deepcopy(model, frozen)
    stage = train.Stage(areas=(512,), batch=(24,), steps=1, lr=1e-4)       # AdamW alone
    (optimizer,) = train.make_optimizers(model, stage)
    with allocated("activations"), torch.autocast("cpu", torch.bfloat16):
        loss = train.flow_matching_loss(model, batch, batch.tokens, t).mean()
    loss.backward()
    with allocated("moments"):
        optimizer.step()

    assert average is not model
    account = amounts_of("train", budget.parameter_counts(config))
    account["activations"] = budget.activation_bytes(config, how, count, grid, text)
    for name, found in measured.items():
        assert found == pytest.approx(account[name], rel=0.05), name


# --- What is printed ------------------------------------------------------------------------------

def test_the_tables_need_no_weights(capsys, monkeypatch):
    monkeypatch.setattr(lens, "build", lambda *_: pytest.fail("a model was built"))
    budget.main(["train", "--size", "nano"])
    said = capsys.readouterr().out
    assert "89,872 parameters" in said
    assert said.count("selective") == 2
    assert "MiB of memory" in said

    budget.main(["train", "--size", "nano", "--lora", "4"])
    said = capsys.readouterr().out
    adapter = int(re.search(r"an adapter of ([\d,]+) learns", said)[1].replace(",", ""))
    assert adapter == budget.parameter_counts(lens.SIZES["nano"].transformer, 4).adapter

    budget.main(["rl", "--size", "nano"])
    said = capsys.readouterr().out
    assert said.count("LoRA 4 ") == 1
    assert "of all GPUs together: sampling" in said

    budget.main(["distill", "--size", "nano"])
    said = capsys.readouterr().out
    assert said.count("all weights") == said.count("LoRA 64") == 2
    assert "heads" in said
    budget.main(["distill", "--size", "nano", "--without", "gan"])
    assert "heads" not in capsys.readouterr().out


def test_a_row_adds_up():
    (row,) = budget.rl_rows("nano")
    cells = budget.cells_of(row, budget.MIB, sustained=400e12)
    heading = dict(zip(budget.COLUMNS, cells, strict=True))
    parts = [float(heading[name]) for name in (*budget.PARTS, "activations")]
    assert float(heading["one GPU"]) == pytest.approx(sum(parts), abs=0.03)
    assert heading[f"FSDP on {budget.GPUS}"] == "-"                        # of adapters: not shared

    row = budget.train_rows("nano", 2, rank=0)[0]
    cells = budget.cells_of(row, 1, sustained=1.0)
    heading = dict(zip(budget.COLUMNS, cells, strict=True))
    fixed = sum(float(heading[name]) for name in budget.PARTS)
    shared = fixed / 8 + float(heading["activations"])
    assert float(heading[f"FSDP on {budget.GPUS}"]) == pytest.approx(shared, abs=0.03)
    assert float(heading["GPU seconds"].replace(",", "")) == pytest.approx(row.flops)


def test_whole_models_of_distillation_are_shared_out_and_adapters_are_not():
    rows = budget.distill_rows("nano", rank=4, gan=True)
    assert [(row.learns, row.sharded) for row in rows] == 2 * [("all weights", True),
                                                               ("LoRA 4", False)]
    without = budget.distill_rows("nano", rank=4, gan=False)
    for row, other in zip(rows, without, strict=True):
        assert row.activations == 2 * other.activations
        assert row.flops > other.flops


@pytest.mark.parametrize("flops, words", [
    (883_000e12, "883 PFLOP"), (253.8e12, "253.8 TFLOP"), (3.2e18, "3.2 EFLOP"),
    (0.5e9, "0.5 GFLOP")])
def test_units_of_work_are_sensible(flops, words):
    assert budget.in_flop(flops) == words


@pytest.mark.parametrize("recipe", ["rl", "distill", "lora"])
def test_a_real_step_beside_the_counted_one(recipe, capsys):
    budget.main(["step", recipe, "--size", "nano", "--lora", "4", "--area", "64",
                 "--pictures", "2", "--device", "cpu"])
    found = budget.json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["peak_gib"] > found["counted_gib"] > 0
    assert 0 < found["adapter"] < found["parameters"] == 89_872


@pytest.mark.parametrize("arguments, words", [
    (["train", "--size", "huge"], "unknown size"),
    (["step", "--size", "nano"], "takes a step"),
    (["rl", "distill"], "takes a step"),
    (["rl", "--lora", "0"], "--lora 0"),
    (["step", "rl", "--area", "50"], "divisible by 16"),
    (["step", "rl", "--pictures", "0"], "--pictures"),
    (["train", "--size", "nano", "--tflops", "0"], "--tflops 0: must be above 0"),
    (["train", "--base-dtype", "bf16"], "--base-dtype is of what is frozen"),
    (["rl", "--base-dtype", "bf16"], "--base-dtype is of what is frozen"),
])
def test_bad_input_is_one_clear_line(arguments, words, capsys):
    assert words in error_line(budget.main, arguments, capsys)


def test_a_random_batch_is_what_data_describes():
    batch = budget.random_batch(lens.SIZES["nano"].transformer, 3, (2, 5), 7)
    assert isinstance(batch, data.Batch)
    assert batch.tokens.shape == (3, 10, 16)
    assert [layer.shape for layer in batch.text] == [(3, 7, 32)] * 2
    assert batch.mask.all()
