"""livrec_fast.data"""
