"""tools/parity.py, on a stand-in for the reference that a test writes: our own code under its
names, so that every number must agree, and with one thing changed must not."""
import subprocess
import sys

import pytest
from conftest import ROOT

STAND_IN = '''
import datetime, sys
sys.path.append({root!r})
exec(open({root!r} + "/lens.py").read(), globals())       # so that kit finds its `lens`
import torch
import sample
from kit.checkpoint import load_pipeline


class Transformer(torch.nn.Module):
    """Their call: hidden states, features of each layer, mask, time, shapes."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.config = model.config

    def forward(self, hidden_states, encoder_features, mask, timestep, img_shapes):
        ((_, h, w),) = img_shapes
        return {factor} * self.model(hidden_states, timestep, encoder_features, mask, (h, w))


class Output:
    def __init__(self, images):
        self.images = images


class LensPipeline:
    @staticmethod
    def from_pretrained(folder, torch_dtype):
        pipe = LensPipeline()
        date = datetime.date.today().isoformat()
        model, pipe.vae, pipe.encoder = load_pipeline(folder, "cpu", torch_dtype, date=date)
        pipe.transformer = Transformer(model)
        return pipe

    def to(self, device):
        return self

    def _build_chat_inputs(self, prompts, length, device):
        rows, _ = self.encoder.tokenize(prompts)
        return torch.tensor(rows), None

    def __call__(self, prompt, negative_prompt, height, width, num_inference_steps, guidance_scale,
                 latents, output_type):
        features = list(self.encoder.encode_each([prompt])[0][:, None])
        mask = torch.ones(features[0].shape[:2], dtype=torch.bool)
        grid = (height // 16, width // 16)
        levels = sigmas(latents.shape[1], num_inference_steps)
        x = latents.float()
        for i in range(num_inference_steps):
            t = levels[i].expand(1)
            v = self.transformer(x, features, mask, t, img_shapes=[(1, *grid)])
            if guidance_scale != 1:
                v = sample.guide(v, self.transformer.model(x, t, None, None, grid), guidance_scale)
            x = euler_step(x, v, levels[i], levels[i + 1])
        return Output(sample.to_pictures(self.vae, x, grid))
'''


@pytest.mark.parametrize("factor, code", [(1, 0), (1.1, 2)])
def test_what_agrees_holds_and_what_does_not_fails(nano, tmp_path, factor, code):
    package = tmp_path / "clone" / "lens"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(STAND_IN.format(root=str(ROOT), factor=factor))
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "parity.py", str(nano), "--reference",
         str(tmp_path / "clone"), "--prompt", "a red circle", "--side", "32", "--steps", "3",
         "--guidance", "2", "--device", "cpu", "--dtype", "fp32"],
        capture_output=True, text=True, cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert done.returncode == code, done.stderr
    assert "holds  tokens that differ: 0 (none)" in lines
    assert sum("features of layer" in line for line in lines) == 2
    failed = [line for line in lines if line.startswith("FAILS")]
    if factor == 1:
        assert failed == []
    else:
        assert any("relative error: 0.0909" in line for line in failed)
        assert not any("features" in line for line in failed)


def test_a_folder_that_is_not_there_is_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "parity.py", str(tmp_path / "none"), "--reference", "x"],
        capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path / 'none'}: no such folder\n"
