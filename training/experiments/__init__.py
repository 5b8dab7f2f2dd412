"""GRPO against supervised fine-tuning from one base policy, and how any policy folder is measured.

    segzero train experiment --out runs/experiment
    python -m training.experiments.evaluate POLICY --split validation
    python -m training.experiments.retention BASE NEW

`README.md` beside this file says what is compared with what, and how to read the report.
"""
