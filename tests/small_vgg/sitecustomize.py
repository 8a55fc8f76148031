"""Python imports a module of this name when it starts: with this folder on PYTHONPATH, every script uses the small
VGG16."""
import small_vgg
