"""The networks that make and judge images, by architecture; gene-expression autoencoder; radiogenomic DNN."""
