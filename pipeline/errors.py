"""The errors a user can mend: each says what was expected, what was found and what to do."""

from __future__ import annotations


class FruitsError(ValueError):
    """Base of every error that the command line tells in one line."""


class StorageError(FruitsError):
    """An address that cannot be read or written: missing, forbidden, unreachable or full."""


class NoImagesError(FruitsError):
    """Nothing to work on."""


class RemovalsError(FruitsError):
    """A listing that lacks so many known images that it may have lost its mind."""


class UnreadableError(FruitsError):
    """So many images that cannot be read that it may not be their fault."""


class InventoryError(FruitsError):
    """An S3 Inventory that is damaged, in another format or lacks a column."""


class OutputTakenError(FruitsError):
    """OUTPUT holds something that this run would mix with or replace."""


class WeightsError(FruitsError):
    """Weights that are missing, broken or of another network."""


class PCAError(FruitsError):
    """A number of components, or a share of variance, that the data cannot give."""


class StateError(FruitsError):
    """A saved PCA or feature table that is damaged or belongs to another model."""


class ClusterError(FruitsError):
    """The cluster on this machine did not start."""


class BrowserError(FruitsError):
    """No browser on this machine that could print a page."""


class DeliverableError(FruitsError):
    """A part of the deliverables that is missing, unfinished or not what the run says."""
