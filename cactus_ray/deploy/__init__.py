"""From a point of the front to files that can be deployed, with a certificate that anybody can check again."""
