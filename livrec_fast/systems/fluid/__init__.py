"""FLUID: live rooms ranked by what they show, with the candidate's room id retired in stages."""
