#pragma once
#include <string>

namespace xlstm::train {

/// Draws <run>/loss.png by libxlstm/plot.py under data::python_interpreter(). Any failure is a warning
/// that names the command to run by hand: a picture never fails a run.
void draw_loss_plot(const std::string& run_dir);

}  // namespace xlstm::train
