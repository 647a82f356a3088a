"""Stand-ins for xlstm.xlstm_large and the backend of mlstm_kernels, of which transformers makes its model where they are."""

from mlstm_kernels.torch import backend_module as kernels
from xlstm.xlstm_large import components, model

from . import cells


class mLSTMBackend(cells.LargeBackend, kernels.mLSTMBackend):
    def forward(self, q, k, v, i, f, c_initial=None, n_initial=None, m_initial=None, return_last_states=None, mode=None):
        return self._run((q, k, v, i, f), (c_initial, n_initial, m_initial), return_last_states, mode)


class RMSNorm(cells.RmsNorm, components.RMSNorm):
    pass


class MultiHeadLayerNorm(cells.LargeHeadNorm, components.MultiHeadLayerNorm):
    pass


class mLSTMLayer(cells.LargeLayer, model.mLSTMLayer):
    HEAD_NORM = MultiHeadLayerNorm


CELLS = {cell.THEIRS: cell for cell in (mLSTMBackend, RMSNorm, MultiHeadLayerNorm, mLSTMLayer)}
