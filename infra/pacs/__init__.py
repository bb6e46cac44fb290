"""A PACS on this machine: Orthanc with DICOMweb, to try it, for tests, and before a router."""
