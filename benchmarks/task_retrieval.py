def retrieval(*a): raise NotImplementedError
def transfer(*a): raise NotImplementedError
