"""A small pretrained text-to-image model of a procedural world, on which a method can be judged in minutes.

Apart from the hook library, which does not import it; needs `apt-hooks[demo]`.

Scene, Concept              what can be shown, and what is personalized     world.py, concepts.py
render                      their pictures                                  render.py: subjects.py, scenery.py
load_pipeline, sample       the models, U-Net and transformer               model.py, denoisers.py: pretrain.py, card.py
load_judges                 what scores pictures                            judge_networks.py: train_judges.py
lora, train                 a LoRA by each method                           personalize.py
Examination                 its scores                                      evaluate.py: metrics.py
run_method                  both, for one method                            experiment.py
run_demo                    `apt-hooks demo`                                demo.py: pictures.py, attention.py
"""
