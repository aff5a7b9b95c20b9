# SPDX-License-Identifier: Apache-2.0
"""MedMNIST's AUC and ACC against values worked out by hand."""

import math

import numpy as np
import pytest

from kdfast.data.labelled.medmnist import medmnist_acc, medmnist_auc

# Rows sum to 1; the largest are at classes 0, 1, 1, 2.
SCORES = np.array([[0.7, 0.2, 0.1], [0.3, 0.4, 0.3], [0.1, 0.6, 0.3], [0.25, 0.25, 0.5]])
TARGET = np.array([0, 0, 1, 2])


@pytest.mark.parametrize("task", ["multiclass", "ordinal"])
def test_classes(task):
    # Class 0: both positives are above both negatives, 1. Class 1: 0.6 is above all three, 1.
    # Class 2: 0.5 is above all three, 1. One of four rows has another largest class.
    assert medmnist_auc(TARGET, SCORES, task) == 1.0
    assert medmnist_acc(TARGET, SCORES, task) == 0.75
    # Class 0: of the pairs (0.7, 0.25) x (0.3, 0.1) three of four are in order.
    # Class 1: 0.4 against 0.2, 0.6, 0.25: 2 of 3. Class 2: 0.3 against 0.1, 0.3, 0.5: 1.5 of 3.
    target = np.array([0, 1, 2, 0])
    assert medmnist_auc(target, SCORES, task) == pytest.approx((3 / 4 + 2 / 3 + 1.5 / 3) / 3)
    assert medmnist_acc(target, SCORES, task) == 0.5


def test_binary():
    target, second = np.array([0, 0, 1, 1]), np.array([0.1, 0.6, 0.5, 0.9])
    both = np.stack([1 - second, second], axis=1)
    for score in (second, both):
        # 0.5 is above 0.1 only, 0.9 above both; a score of exactly the threshold is negative.
        assert medmnist_auc(target, score, "binary") == 0.75
        assert medmnist_acc(target, score, "binary") == 0.5
        assert medmnist_acc(target, score, "binary", threshold=0.45) == 0.75


def test_several_labels():
    target = np.array([[1, 0], [0, 0], [1, 1], [0, 1]])
    score = np.array([[0.9, 0.6], [0.6, 0.1], [0.8, 0.7], [0.2, 0.3]])
    # Label 0: all four pairs in order. Label 1: 0.7 above 0.6 and 0.1, 0.3 above 0.1: 3 of 4.
    assert medmnist_auc(target, score, "multilabel") == pytest.approx((1 + 3 / 4) / 2)
    # Right of label 0: rows 0, 2, 3. Of label 1: rows 1, 2.
    assert medmnist_acc(target, score, "multilabel") == pytest.approx((3 / 4 + 2 / 4) / 2)


def test_auc_of_an_absent_class_is_not_a_number():
    assert math.isnan(medmnist_auc([0, 1, 1, 0], SCORES, "multiclass"))
    assert math.isnan(medmnist_auc([1, 1], [0.5, 0.6], "binary"))
    assert medmnist_acc([0, 1, 1, 0], SCORES, "multiclass") == 0.75


def test_rejects():
    with pytest.raises(ValueError, match=r"task: must be one of the four .*got 'multi-class'"):
        medmnist_auc(TARGET, SCORES, "multi-class")
    for task, target, score in (
        ("multiclass", TARGET[:, None], SCORES),
        ("multiclass", TARGET, SCORES[:, 0]),
        ("multilabel", TARGET, SCORES),
        ("binary", TARGET, SCORES),
        ("ordinal", [], np.zeros((0, 3))),
    ):
        with pytest.raises(ValueError, match=f"metric: {task} targets and scores must fit"):
            medmnist_acc(target, score, task)
