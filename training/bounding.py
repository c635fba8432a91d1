"""What part of a task a base can take: the calls that fit are learned and certified, the others stay on the LLM.

How long a prompt is in the base's tokens is known before the answer, to the engine as to the training, so the length
itself tells at request time which part a call is of: the engine refuses what is too long, validation counts that as an
answer without confidence, and the gateway escalates it. A task is refused as a whole only where too little of it fits.
"""

from __future__ import annotations

from training.dataset import TaskData, num_answer_tokens


def refuse_lengths(
    data: TaskData, base_name: str, max_answer_tokens: int, num_calibration: int, num_needed: int
) -> str | None:
    """Why too few of this task's prompts or answers fit the base's engine, or None.

    Args:
        num_calibration: calibration calls of the task, of any length; calls of train tell how many of them fit.
        num_needed: calibration calls below which nothing can be certified.
    """
    num_rows, num_all = len(data.train), len(data.train) + data.num_skipped
    num_fitting = num_calibration * num_rows // max(1, num_all)
    if not num_rows or (data.num_skipped and num_fitting < num_needed):
        return (
            f"{data.num_skipped} of {num_all} prompts do not fit base {base_name}: longer than "
            f"{data.prompt_format.max_prompt_tokens} tokens, or not plain text; about {num_fitting} calibration calls do, "
            f"and {num_needed} are needed"
        )
    too_long = sum(num_answer_tokens(row) > max_answer_tokens for row in data.train)
    if too_long >= max(1, num_rows // 2):
        return (
            f"{too_long} of {num_rows} answers are longer than {max_answer_tokens} tokens, a quarter of "
            "specialists.max_model_tokens; give the engine a longer window"
        )
    return None


def describe_left_out(data: TaskData) -> str | None:
    """What stays on the LLM of a task that is learned, or None where all of it fits."""
    if not data.num_skipped:
        return None
    return (
        f"{data.num_skipped} of {len(data.train) + data.num_skipped} train prompts are longer than "
        f"{data.prompt_format.max_prompt_tokens} tokens or not plain text: such calls go to the LLM, the specialist "
        "learns and answers the others"
    )
