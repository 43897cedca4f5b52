"""The tables of both papers, and the further tables of a report, made from a `Study`.

`all_tables` lists them in the order of the report. Each stands in the module of its theme:

    overview_tables     datasets, runs and their cost
    comparison_tables   methods against each other and against the reference
    ablation_tables     settings and components
    analysis_tables     what the recommended lists hold
    cells               what all tables share

Figures are means over the runs of the seeds, each at its `Run.alpha`, unless a caption says
otherwise. Only complete runs count. The blocks of a table are datasets and backbones; the best
(bold) and the second best value (underlined) are those of a block.
"""

from dataclasses import replace

from igd_ds.studies.report.ablation_tables import (
    alpha_grid,
    beta_sensitivity,
    igd_ablation,
    linear_and_binary,
    mtc_ablation,
    selection,
)
from igd_ds.studies.report.analysis_tables import (
    beam_and_exact,
    calibration,
    diversity,
    examples,
    relaxed_match,
    row_groups,
)
from igd_ds.studies.report.comparison_tables import (
    backbones,
    main_results,
    quantizers,
    significance_of,
)
from igd_ds.studies.report.layout import Table, unique_names
from igd_ds.studies.report.overview_tables import all_runs, dataset_statistics, filtering_ratio
from igd_ds.studies.report.study import Study


def all_tables(study: Study) -> list[Table]:
    """Return every table that the study has data for."""
    made = []
    for make in (
        dataset_statistics, filtering_ratio, main_results, significance_of, selection,
        beta_sensitivity, igd_ablation, linear_and_binary, alpha_grid, mtc_ablation, backbones,
        quantizers, relaxed_match, row_groups, diversity, beam_and_exact, calibration, examples,
        all_runs,
    ):  # fmt: skip
        made += make(study)
    tables = [table for table in made if table.rows]
    names = unique_names([table.name for table in tables])
    return [replace(table, name=name) for table, name in zip(tables, names, strict=True)]
