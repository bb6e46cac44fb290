"""Everything that runs the project on machines: local services, images, Kubernetes."""
