"""Conversion of trained Pre-LN models to their equal, cheaper Pre-RMSNorm and Pre-CRMSNorm twins.

result = effkern.convert.to_rmsnorm(model, (example,))      # edits the model in place; to_crmsnorm
print(result.report)
"""

from effkern.convert.checkpoint import load
from effkern.convert.conversion import Conversion
from effkern.convert.crmsnorm import to_crmsnorm
from effkern.convert.report import ConversionReport, NotConvertible
from effkern.convert.rmsnorm import to_rmsnorm
from effkern.convert.training import inference_form, training_form

__all__ = [
    "Conversion",
    "ConversionReport",
    "NotConvertible",
    "inference_form",
    "load",
    "to_crmsnorm",
    "to_rmsnorm",
    "training_form",
]
