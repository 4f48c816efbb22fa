"""A radiogenomic cohort drawn from an atlas: gene expression and brain MRI that share latent causes.

Read in this order: `panel` (the genes), `latents` (what causes what), `expression`, `anatomy`, `tumour`, `style`,
`patient` (all of it together), `public` (a public cohort without any link, for pre-training).
"""
