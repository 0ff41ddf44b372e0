"""`paft study`: small experiments that test the claims of papers, with seeds and intervals.

study               a study's definition (recipes/studies/NAME.yaml)
seeds               runs the seeds; resume; the file of results
seed_intervals      intervals over seeds
pages               tables and sentences, from the results
plots               lines and intervals, from the results
frontiers           models by two metrics, from the results
policy_losses       the losses of `training`, for policies over states and actions
frozen_lake         study `frozen-lake`
bandit              study `on-policy`
story_model         the base, rewards and prompts of the studies of language models
on_policy_lm        study `on-policy-lm`
precision           study `precision`
"""

from paft_merge.studies.seeds import StudyResult as StudyResult
from paft_merge.studies.seeds import run_study as run_study
