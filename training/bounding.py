"""What part of a task a base can take: the calls that fit are learned and certified, the others stay on the LLM.

How long a prompt is in the base's tokens is known before the answer, to the engine as to the training, so the length
itself tells at request time which part a call is of: the engine refuses what is too long, validation counts that as an
answer without confidence, and the gateway escalates it. A task is refused as a whole only where too little of it fits.
"""

from __future__ import annotations

from training.dataset import TaskData, num_answer_tokens


def keep_fitting(data: TaskData, max_tokens: int) -> TaskData:
    """Without the examples whose prompt and answer together outgrow the engine's window: it could never say them."""
    train, validation = (
        [row for row in rows if len(row["input_ids"]) <= max_tokens] for rows in (data.train, data.validation)
    )
    num_skipped = data.num_skipped + len(data.train) - len(train)
    return data._replace(train=train, validation=validation, num_skipped=num_skipped)


def refuse_lengths(
    data: TaskData, base_name: str, max_answer_tokens: int, num_calibration: int, num_needed: int
) -> str | None:
    """Why this task has nothing to learn from, or too few prompts or answers that fit the base's engine; or None.

    Args:
        num_calibration: calibration calls of the task, of any length; calls of train tell how many of them fit.
        num_needed: calibration calls below which nothing can be certified.
    """
    num_rows, num_all = len(data.train), len(data.train) + data.num_skipped
    if not num_all:
        return "no example in its train split; it needs more calls, or a larger curate.split.train"
    num_fitting = num_calibration * num_rows // num_all
    if not num_rows or (data.num_skipped and num_fitting < num_needed):
        return (
            f"{data.num_skipped} of {num_all} examples do not fit base {base_name}: prompts longer than "
            f"{data.prompt_format.max_prompt_tokens} tokens, answers that the window has no room for, or not plain text; "
            f"about {num_fitting} calibration calls do, and {num_needed} are needed"
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
        f"{data.num_skipped} of {len(data.train) + data.num_skipped} train examples have prompts longer than "
        f"{data.prompt_format.max_prompt_tokens} tokens, answers that the window has no room for, or are not plain text: "
        "such calls go to the LLM, the specialist learns and answers the others"
    )
