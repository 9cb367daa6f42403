"""GDP: gates that polarise to exact zeros and are absorbed (Guo et al., ICCV 2021)."""

from wgates_plugin.strategies.gdp.gates import PolarisedGates
from wgates_plugin.strategies.gdp.settings import GDPSettings
from wgates_plugin.strategies.gdp.strategy import GDPStrategy

__all__ = ["GDPSettings", "GDPStrategy", "PolarisedGates"]
