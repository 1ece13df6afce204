"""livrec_fast.systems"""
