"""The paper's Tables 1 to 3 as Markdown, own rows beside published ones; for evaluate.py tables."""
from typing import NamedTuple


class PaperTable(NamedTuple):
    """One table of the paper: which metrics it shows and what is published."""
    title: str
    columns: dict       # {JSON key of the metric: heading}
    quoted: dict        # {publication: {key: value}}


# ECHOPulse is measured on its own data, after fine-tuning. The others are measured on EchoNet-
# Dynamic at 112 x 112 (EchoDiffusion: Reynaud et al., MICCAI 2023; EchoNet-Synthetic: Reynaud et
# al. 2024).
TABLES = (
    PaperTable(
        "Table 1, reconstruction",
        columns=dict(mse="MSE", mae="MAE", psnr="PSNR", ssim="SSIM"),
        quoted={
            "ECHOPulse": dict(mse=2.89e-3, mae=0.0292),
            "EchoNet-Synthetic, autoencoder": dict(psnr=24.9, ssim=0.78),
        }),
    PaperTable(
        "Table 2, generation",
        columns=dict(fid="FID", fvd="FVD", ssim="SSIM", kid="KID", lpips="LPIPS"),
        quoted={"EchoDiffusion 1SCM": dict(fid=12.3, fvd=60.5)}),
    PaperTable(
        "Table 3, ejection fraction",
        columns=dict(ef_r2="R2", ef_mae="MAE", ef_rmse="RMSE"),
        quoted={
            "ECHOPulse": dict(ef_r2=0.85, ef_mae=2.5, ef_rmse=2.9),
            "EchoDiffusion 4SCM": dict(ef_r2=0.93, ef_mae=3.8),
        }),
)


def table_row(source, values, columns, unknown):
    """One Markdown line: the source, then its value in each column, `unknown` where it has none."""
    cells = [source]
    for key in columns:
        value = values.get(key)
        cells.append(unknown if value is None else f"{value:.3g}")
    return f"| {' | '.join(cells)} |"


def markdown(measured, about):
    """The three tables as text.

    measured: one dict of metrics a table, in which None means not computed; about: a line that
    names the set, the weights and the machine.
    """
    parts = [f"# Tables 1 to 3\n\nMeasured here: {about}. "
             "Quoted: from the publications, on other data."]
    for table, metrics in zip(TABLES, measured):
        own = f"measured here, {metrics['clips']} clips"
        lines = [
            "| | " + " | ".join(table.columns.values()) + " |",
            "|---" * (len(table.columns) + 1) + "|",
            table_row(own, metrics, table.columns, "not computed"),
        ]
        for source, values in table.quoted.items():
            lines.append(table_row(f"{source}, quoted", values, table.columns, ""))
        parts.append(f"## {table.title}\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"
