"""livrec_fast.modules"""
