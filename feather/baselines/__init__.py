"""Methods that Feather is compared with: one paper, one file, its link on the first line."""

from feather.baselines.acdc import ACDC
from feather.baselines.powerprop import PowerProp
from feather.baselines.rigl import RigL
from feather.baselines.set import SET
from feather.baselines.spartan import Spartan
from feather.baselines.sr_ste import SRSTE
from feather.baselines.st3 import ST3, ST3Sigma
from feather.baselines.str import STR
from feather.baselines.topkast import TopKAST

__all__ = ["ACDC", "SET", "SRSTE", "ST3", "STR", "PowerProp", "RigL", "ST3Sigma", "Spartan", "TopKAST"]
