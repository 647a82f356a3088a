"""Stand-ins for transformers' own xLSTM, which it has where the xlstm package is absent."""

from transformers.models.xlstm import modeling_xlstm as theirs

from . import cells

CELLS = {}

if hasattr(theirs, "xLSTMBackend"):

    class xLSTMBackend(cells.LargeBackend, theirs.xLSTMBackend):
        def forward(self, query, key, value, igate, fgate, c_initial=None, n_initial=None, m_initial=None,
                    return_last_states=None, mode=None):
            return self._run((query, key, value, igate, fgate), (c_initial, n_initial, m_initial), return_last_states, mode)

    class xLSTMRMSNorm(cells.RmsNorm, theirs.xLSTMRMSNorm):
        pass

    class xLSTMMultiHeadLayerNorm(cells.LargeHeadNorm, theirs.xLSTMMultiHeadLayerNorm):
        pass

    class xLSTMLayer(cells.LargeLayer, theirs.xLSTMLayer):
        HEAD_NORM = xLSTMMultiHeadLayerNorm

    CELLS = {cell.THEIRS: cell for cell in (xLSTMBackend, xLSTMRMSNorm, xLSTMMultiHeadLayerNorm, xLSTMLayer)}
