"""Import and export of other programs' model formats: torch's tensors, diffusers folders, StableHLO.

The files, by the layout that each handles:

| layout | file | used by |
| --- | --- | --- |
| .safetensors | `safetensors_file.py` | every reader of weights, including our own model files |
| torch.save: .pth, .pt, .bin | `torch_file.py` | feature extractors of an evaluation |
| names and axes of torch's tensors | `torch_layout.py` | import and export |
| config.json and other JSON | `json_files.py` | import, text encoders, tokenizers |
| a component of a diffusers folder | `diffusers_folder.py` | import and export |
| config.json of a U-Net, DiT or scheduler | `diffusers_configs.py` | import and export |
| an autoencoder: config.json and weights | `diffusers_autoencoder.py` | import, latents, `encode` |
| one file of Stable Diffusion or an LDM | `single_file.py` | import |
| its noise levels; its tensors' names | `single_file_noise.py`; `compvis_names.py` | `single_file.py` |

`import_model.py` imports, from a diffusers folder, a single file or a hub. The exporters are
`own_export.py` (a run or a model file of this package), `diffusers_export.py` and
`stablehlo_export.py`; they share `exporting.py` and `card.py`, which writes model cards. `hub.py`
downloads from a hub and uploads to it. `companions.py` keeps the other components of an
imported latent model. Two files are copied into exports and import nothing from this package:
`scheduling_guided_distill.py` and `run_stablehlo.py`.
"""
