"""What others report of themselves, as it stands in their papers: rows to put ours beside, each with its source.

Nothing was measured here, and sources differ in prompts, ties and sampling.
"""

from dataclasses import dataclass

REWARDBENCH = ("overall", "Chat", "Chat Hard", "Safety", "Reasoning")
RM_BENCH = ("overall", "Chat", "Math", "Code", "Safety", "hard", "normal", "easy")


@dataclass(frozen=True)
class Row:
    """One system on one benchmark, in per cent; None where the source does not say."""

    system: str
    kind: str  # scalar, pairwise, or pointwise
    values: tuple[float | None, ...]  # in the order of the columns
    source: str
    ties: str  # how the source counts equal scores: wrong, half, or not stated


# Its table was not at hand when these rows were written.
PATARM = (
    "only means of its gains are at hand, + 8.7 % over its base models on RewardBench and RM-Bench together (arXiv "
    "2510.24235v2), + 4.7 % over pointwise baselines (v1)."
)
_RM_R1 = "arXiv 2505.02387, Tables 6 and 7"
_TIES_RM_R1 = "half, unreadable wrong (its code)"
_SKYWORK = "Skywork-Reward-Llama-3.1-8B"

ROWS: dict[str, tuple[Row, ...]] = {
    "rewardbench": (
        Row(_SKYWORK, "scalar", (92.5, 95.8, 87.3, 90.8, 96.2), _RM_R1, "not stated"),
        Row("Skywork-Reward-V2-Qwen3-8B", "scalar", (93.7, *(None,) * 4), "arXiv 2507.01352, Table 1", "not stated"),
        Row("DeepSeek-GRM-27B, greedy", "pointwise", (86.0, 94.1, 78.3, 88.0, 83.8), "arXiv 2504.02495", "not stated"),
        Row(
            "DeepSeek-GRM-27B, 32 votes", "pointwise", (88.5, 95.5, 81.8, 90.0, 86.9), "arXiv 2504.02495", "not stated"
        ),
        Row("RM-R1-Qwen-Instruct-7B", "pairwise", (85.2, 94.1, 74.6, 85.2, 86.7), _RM_R1, _TIES_RM_R1),
        Row("RM-R1-DeepSeek-Distilled-Qwen-7B", "pairwise", (80.1, 88.9, 66.2, 78.4, 87.0), _RM_R1, _TIES_RM_R1),
        Row("RM-R1-Qwen-Instruct-14B", "pairwise", (88.2, 93.6, 80.5, 86.9, 92.0), _RM_R1, _TIES_RM_R1),
        Row("RM-R1-DeepSeek-Distilled-Qwen-14B", "pairwise", (88.9, 91.3, 79.4, 89.3, 95.5), _RM_R1, _TIES_RM_R1),
        Row("Rubric-ARM", "pairwise", (None, 89.4, 79.6, None, None), "arXiv 2602.01511, Table 1", "not stated"),
        Row(
            "Rubric-ARM, 5 votes", "pairwise", (None, 90.3, 80.7, None, None), "arXiv 2602.01511, Table 1", "not stated"
        ),
    ),
    "rm-bench": (
        Row(_SKYWORK, "scalar", (70.1, 69.5, 60.6, 54.5, 95.7, 46.6, 74.7, 89.0), _RM_R1, "wrong (RM-Bench's code)"),
        Row(
            "Skywork-Reward-V2-Qwen3-8B",
            "scalar",
            (82.6, None, None, None, None, 70.1, 85.7, 91.9),
            "arXiv 2507.01352, Tables 1 and 4",
            "not stated",
        ),
        Row(
            "RM-R1-Qwen-Instruct-7B", "pairwise", (70.2, 66.6, 67.0, 54.6, 92.6, 59.7, 71.7, 79.2), _RM_R1, _TIES_RM_R1
        ),
        Row(
            "RM-R1-DeepSeek-Distilled-Qwen-7B",
            "pairwise",
            (72.4, 64.0, 83.9, 56.2, 85.3, 68.1, 73.1, 75.9),
            _RM_R1,
            _TIES_RM_R1,
        ),
        Row(
            "RM-R1-Qwen-Instruct-14B", "pairwise", (76.1, 75.6, 75.4, 60.6, 93.6, 68.8, 77.5, 82.6), _RM_R1, _TIES_RM_R1
        ),
        Row(
            "RM-R1-DeepSeek-Distilled-Qwen-14B",
            "pairwise",
            (81.5, 71.8, 90.5, 69.5, 94.1, 74.4, 83.6, 86.2),
            _RM_R1,
            _TIES_RM_R1,
        ),
        Row(
            "Rubric-ARM",
            "pairwise",
            (None, 69.2, None, None, None, None, None, None),
            "arXiv 2602.01511, Table 1",
            "not stated",
        ),
    ),
}
COLUMNS = {"rewardbench": REWARDBENCH, "rm-bench": RM_BENCH}
