"""The Flower ClientApp of this app, for `flwr run`."""

from fedmed.federated import client_app

app = client_app.app
