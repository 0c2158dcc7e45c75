"""The paper's Tables 1 to 3 as Markdown: a model's own rows beside what others publish."""

# title; columns, figure -> heading; quoted rows. ECHOPulse: on its own data, after fine-tuning; the others:
# on EchoNet-Dynamic at 112 x 112 (EchoDiffusion: Reynaud et al., MICCAI 2023; EchoNet-Synthetic: 2024)
TABLES = (
    ("Table 1, reconstruction", dict(mse="MSE", mae="MAE", psnr="PSNR", ssim="SSIM"),
     {"ECHOPulse": dict(mse=2.89e-3, mae=0.0292),
      "EchoNet-Synthetic, autoencoder": dict(psnr=24.9, ssim=0.78)}),
    ("Table 2, generation", dict(fid="FID", fvd="FVD", ssim="SSIM", kid="KID", lpips="LPIPS"),
     {"EchoDiffusion 1SCM": dict(fid=12.3, fvd=60.5)}),
    ("Table 3, ejection fraction", dict(ef_r2="R2", ef_mae="MAE", ef_rmse="RMSE"),
     {"ECHOPulse": dict(ef_r2=0.85, ef_mae=2.5, ef_rmse=2.9),
      "EchoDiffusion 4SCM": dict(ef_r2=0.93, ef_mae=3.8)}),
)


def markdown(measured, about):
    """measured: the figures of each table, None = not computed; about: a line on set, weights and machine."""
    parts = [f"# Tables 1 to 3\n\nMeasured here: {about}. Quoted: from the publications, on other data."]
    for (title, columns, quoted), figures in zip(TABLES, measured):
        def row(source, values, unknown):
            cells = (unknown if values.get(key) is None else f"{values[key]:.3g}" for key in columns)
            return f"| {source} | {' | '.join(cells)} |"
        rows = ["| | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|",
                row(f"measured here, {figures['clips']} clips", figures, "not computed")]
        rows += [row(f"{source}, quoted", values, "") for source, values in quoted.items()]
        parts.append(f"## {title}\n\n" + "\n".join(rows))
    return "\n\n".join(parts) + "\n"
