"""A LoRA adapter and its masks to the Hub and back, against a hub on the loopback interface."""

import json
from pathlib import Path
from typing import Any

PROGRAM = """
import json, sys
import peft, torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from sparse_hf import AutoSparseModelForCausalLM, SparseConfig, Streaming, push_to_hub, save_artefact, sparsify

torch.manual_seed(0)
folder = sys.argv[1]
config = LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, head_dim=16, max_position_embeddings=256)
LlamaForCausalLM(config).push_to_hub("me/lora-base")
base = AutoModelForCausalLM.from_pretrained("me/lora-base")
model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
sparsify(model, SparseConfig(sparse=Streaming(num_sink_tokens=4, window_size=16), head_masks=((0, 1), (1, 0))))
ids = torch.arange(96)[None]

@torch.no_grad()
def logits(model):
    return model.eval()(ids, use_cache=False).logits

expected = logits(model)
push_to_hub(save_artefact(model, folder + "/whole"), "me/lora-masks")
model.push_to_hub("me/lora-alone")
report = {
    "auto": torch.equal(logits(AutoSparseModelForCausalLM.from_pretrained("me/lora-masks")), expected),
    "onto_base": torch.equal(
        logits(sparsify(AutoModelForCausalLM.from_pretrained("me/lora-base"), "me/lora-masks")), expected
    ),
    "dense_differs": not torch.allclose(logits(AutoModelForCausalLM.from_pretrained("me/lora-alone")), expected),
}
try:
    AutoSparseModelForCausalLM.from_pretrained("me/lora-alone")
except ValueError as error:
    report["alone"] = str(error)
print(json.dumps(report))
"""


def test_adapter_and_masks_come_back_whole(local_hub: Any, run_on_hub: Any, tmp_path: Path) -> None:
    process = run_on_hub(PROGRAM, str(tmp_path))
    assert process.returncode == 0, process.stderr[-4000:]
    report = json.loads(process.stdout.splitlines()[-1])
    assert "without the head masks" in report.pop("alone")
    assert report == {"auto": True, "onto_base": True, "dense_differs": True}
    files = local_hub.repos["me/lora-masks"].files("main")
    assert {"adapter_config.json", "adapter_model.safetensors", "sparse_config.json", "README.md"} <= set(files)
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "me/lora-base"
