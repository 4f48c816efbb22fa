"""The networks: conditional DCGAN, gene-expression autoencoder, radiogenomic DNN."""
