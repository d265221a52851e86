"""Domain shifts fitted to a flow that is there already, from the latents of images.

With means m and covariances C of the clean (x) and the degraded (y) latents, over all positions,

    mu = m_y - m_x,    Sigma = the positive part of C_y - C_x,    M its symmetric root.

In directions where degraded latents vary less than clean ones, Sigma is zero: no independent u can
narrow (the paper's appendices A and B, for one dimension). :func:`fit_shifts` does so for whole
domains (the "shift fitted after training" of section 5.7), :func:`adapt` adds a domain to a model,
:func:`fit_in_flat_areas` sets M alone, where nothing but noise differs, and :func:`remove_cast`
corrects mu alone, by eq. (6).
"""

from deflow_aug.adaptation.cast import remove_cast
from deflow_aug.adaptation.domains import fit_shifts
from deflow_aug.adaptation.flat_fit import fit_in_flat_areas
from deflow_aug.adaptation.new_domain import adapt
from deflow_aug.adaptation.photographs import AdaptationError

__all__ = ["AdaptationError", "adapt", "fit_in_flat_areas", "fit_shifts", "remove_cast"]
