"""Print how well a row's shape, and its words, separate harm in the lab's mixes: one Markdown row a task and harm.

    python tools/lab_shortcuts.py

AUROC of answer length, prompt length (words, then letters), having a compliant opener, and a TF-IDF logistic classifier
on all the row's words, cross-validated with the true labels (an upper bound no filter without labels has).
"""

from __future__ import annotations

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline

from gradshield import lab
from gradshield.lab.answers import OPENERS

RATIO, ROWS, SEED = 0.3, 500, 0


def shortcuts(task: str, harm: str) -> list[float]:
    """The AUROCs of one mix, in the order of the table's columns."""
    rows, labels = lab.mix(task, harm, RATIO, ROWS, SEED)
    prompts = [row["messages"][0]["content"] for row in rows]
    answers = [row["messages"][1]["content"] for row in rows]
    shapes = (
        [len(text.split()) for text in answers],
        [len(text) for text in answers],
        [len(text.split()) for text in prompts],
        [len(text) for text in prompts],
        [text.startswith(OPENERS) for text in answers],
    )
    words = make_pipeline(TfidfVectorizer(), LogisticRegression(C=10, max_iter=1000))
    texts = [f"{prompt} {answer}" for prompt, answer in zip(prompts, answers, strict=True)]
    learned = cross_val_predict(words, texts, labels, cv=5, method="predict_proba")[:, 1]
    return [float(roc_auc_score(labels, np.asarray(values, dtype=float))) for values in (*shapes, learned)]


def main() -> None:
    print("| harm | task | answer words | answer letters | prompt words | prompt letters | opener | TF-IDF |")
    print("|---|---|---|---|---|---|---|---|")
    for harm in lab.HARMS:
        for task in lab.TASKS:
            cells = " | ".join(f"{value:.2f}" for value in shortcuts(task, harm))
            print(f"| {harm} | {task} | {cells} |")


if __name__ == "__main__":
    main()
