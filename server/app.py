"""The Flower ServerApp of this app, for `flwr run`."""

from fedmed.federated import server_app

app = server_app.app
